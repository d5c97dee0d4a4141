"""Checkpoints that are written while the run goes on."""

import os
import threading

import pytest
import tiny_run
import torch
from safetensors.torch import load_file
from trainer_run import BATCH, STEPS, read_losses, run_trainer, train_in, write_shards

from aclip.config.sections import TrainConfig
from aclip.engine.host_copy import HostBuffers
from aclip.run_folder import checkpoint_folder
from aclip.training import checkpoint, saver

pytestmark = pytest.mark.distributed
SECONDS = 60
"""Until a write that is held up gives up, so that a run which waits for it fails."""


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"))


class HeldUp:
    """Holds up what the thread of this process does with its copies until `free` is set: sending
    them to rank 0, and writing files."""

    def __init__(self):
        self.free = threading.Event()
        self.free.set()
        checkpoint.save_file = self._waits(checkpoint.save_file)
        checkpoint.collect = self._waits(checkpoint.collect)

    def _waits(self, function):
        def wait(*args):
            if not self.free.wait(SECONDS):
                raise TimeoutError("the run waits for the write")
            return function(*args)

        return wait


def checkpoints(run):
    return [checkpoint_folder.num_samples(p) for p in checkpoint_folder.complete(run)]


@pytest.mark.parametrize("stage, ranks", [("0", 1), ("1", 2), ("3", 2)])
def test_steps_go_on_while_a_checkpoint_of_the_step_before_them_is_written(
    run_distributed, shards, tmp_path, stage, ranks
):
    overrides = [f"train.checkpoint_every={5 * BATCH}", "train.keep_checkpoints=9"]

    def train_with_slow_disk():
        disk, seen = HeldUp(), []

        def on_step(step):
            if step == 5:
                disk.free.clear()
            if step == 9:
                seen.extend(checkpoints(tmp_path / "slow" / "checkpoints"))
                disk.free.set()

        run_trainer(
            tmp_path / "slow", shards, stage, overrides=overrides, stop_at=10, on_step=on_step
        )
        return seen

    run_distributed(train_in(tmp_path / "fast", shards, stage=stage, overrides=overrides), ranks)
    assert run_distributed(train_with_slow_disk, ranks)[0] == []
    assert read_losses(tmp_path / "slow") == read_losses(tmp_path / "fast")[:10]
    fast, slow = (
        tmp_path / name / "checkpoints" / f"samples-{5 * BATCH:012d}" for name in ("fast", "slow")
    )
    assert checkpoint_folder.verify(slow) is None
    assert (slow / "state.json").read_text() == (fast / "state.json").read_text()
    for name in ("student", "optimizer", "teacher", "rng"):
        expected = load_file(fast / f"{name}.safetensors")
        found = load_file(slow / f"{name}.safetensors")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], value) for key, value in expected.items()), name


def test_run_killed_while_a_checkpoint_is_written_goes_on_from_the_one_before(
    run_distributed, shards, tmp_path
):
    overrides = [f"train.checkpoint_every={4 * BATCH}"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"

    def train_until_killed():
        disk = HeldUp()

        def on_step(step):
            if step == 6:  # before the checkpoint of step 8, and after that of step 4
                disk.free.clear()

        run_trainer(killed, shards, overrides=overrides, on_step=on_step, kill_at=11)

    run_distributed(train_in(whole, shards), 1)
    with pytest.raises(RuntimeError, match="exit code -9"):
        run_distributed(train_until_killed, 1)
    assert checkpoints(killed / "checkpoints") == [4 * BATCH]
    run_distributed(train_in(killed, shards), 1)
    assert read_losses(killed) == read_losses(whole)


def test_one_checkpoint_at_a_time_is_in_memory(run_distributed, tmp_path):
    def save_twice():
        run, events = tiny_run.TinyRun(tmp_path, 0), []
        disk, gather, write = HeldUp(), checkpoint.gather, checkpoint.write

        def noted_gather(*args):
            events.append("gathers")
            return gather(*args)

        def noted_write(*args):
            folder = write(*args)
            events.append(f"wrote {folder.name[-2:]}")
            return folder

        checkpoint.gather, checkpoint.write = noted_gather, noted_write
        one = saver.Saver(tmp_path / "checkpoints", run.engine, run.teacher, TrainConfig())
        disk.free.clear()
        one.save({"samples": 8}, (8, []))
        events.append("goes on")
        threading.Timer(0.2, disk.free.set).start()
        one.save({"samples": 16}, (16, []))
        one.close()
        return events

    events = run_distributed(save_twice, 1)[0]
    assert events == ["gathers", "goes on", "wrote 08", "gathers", "wrote 16"]


@pytest.mark.parametrize("stage, ranks", [(0, 1), (1, 2), (3, 2)])
def test_every_save_takes_the_memory_that_was_prepared(run_distributed, tmp_path, stage, ranks):
    def save_twice():
        run, taken = tiny_run.TinyRun(tmp_path, stage), []
        take = HostBuffers.take

        def noted_take(*args, **named):
            taken.append(take(*args, **named))
            return taken[-1]

        HostBuffers.take = noted_take
        one = saver.Saver(tmp_path / "checkpoints", run.engine, run.teacher, TrainConfig())
        run.step(0)
        one.prepare()
        for samples in (8, 16):
            one.save({"samples": samples}, (samples, []))
        one.close()
        return [tensor.data_ptr() for tensor in taken], sum(tensor.nbytes for tensor in taken)

    results = run_distributed(save_twice, ranks)
    for places, _ in results:
        share = len(places) // 3
        assert places == 3 * places[:share] and len(set(places)) == share
    # Other ranks copy their own part alone: without ZeRO none, else half of masters and moments.
    assert all(size < 0.55 * results[0][1] for _, size in results[1:])


def test_checkpoint_that_fails_is_not_taken_for_saved(run_distributed, tmp_path, capfd):
    """It is asked for again with the same moment, as at the end of a run."""

    def fail_then_save():
        run, root = tiny_run.TinyRun(tmp_path, 1), tmp_path / "checkpoints"
        one = saver.Saver(root, run.engine, run.teacher, TrainConfig())
        root.write_text("in the way")
        one.save({"samples": 8}, (8, []))
        saved = [one.is_saved((8, []))]
        with pytest.raises(checkpoint.CheckpointError, match="samples-000000000008"):
            one.save({"samples": 8}, (8, []), required=True)
        torch.distributed.barrier()
        root.unlink(missing_ok=True)
        torch.distributed.barrier()
        one.save({"samples": 8}, (8, []))
        saved.append(one.is_saved((8, [])))
        one.close()
        return saved

    assert run_distributed(fail_then_save, 2) == [[False, True]] * 2
    said = capfd.readouterr().out
    assert said.count("was not written") == said.count("the run goes on, and the checkpoint") == 1


@pytest.mark.parametrize("minutes, saved_at", [(20, [5, 13, STEPS]), (0, [STEPS])])
def test_rank_0s_clock_decides_for_all_ranks(run_distributed, shards, tmp_path, minutes, saved_at):
    def train():
        now = [0.0]
        saver.monotonic = lambda: now[0]

        def on_step(step):
            if os.environ["RANK"] == "0" and step in (4, 12):
                now[0] += 20 * 60

        overrides = ["train.keep_checkpoints=9", f"train.checkpoint_minutes={minutes}"]
        run_trainer(tmp_path / "run", shards, overrides=overrides, on_step=on_step)

    run_distributed(train, 2)
    # All ranks hear of the clock one step later.
    found = checkpoints(tmp_path / "run" / "checkpoints")
    assert found == [step * BATCH for step in saved_at]
