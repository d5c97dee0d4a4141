"""Checkpoints on a full disk, after a kill between two renames, and under another recipe."""

import os
import random
import resource
import signal
import time

import pytest
import tiny_run

from aclip.errors import ConfigError
from aclip.run_folder import checkpoint_folder
from aclip.training import checkpoint

pytestmark = pytest.mark.distributed


def save(root, run, samples, keep=2):
    state = {"samples": samples, "step": samples // 8, "marker": f"at {samples}"}
    return run.save(root, state, keep)


def names(root):
    return sorted(path.name for path in root.iterdir())


def marker_of_latest(root):
    """What a restarted run would find; every file of it is checked."""
    return checkpoint.read_state(checkpoint_folder.find(root, "auto"))["marker"]


def in_one_process(run_distributed, function, *args):
    """Runs the test's body on one forked rank, since DeepSpeed needs a process group."""
    return run_distributed(function, 1, *args)[0]


def test_full_disk_is_reported_on_every_rank_and_keeps_the_previous_checkpoint(
    run_distributed, tmp_path
):
    root = tmp_path / "checkpoints"

    def save_twice():
        run = tiny_run.TinyRun(tmp_path, 1)
        save(root, run, 8)
        # Files end at 100 kB, as on a disk with no more room.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        try:
            with pytest.raises(checkpoint.CheckpointError) as caught:
                save(root, run, 16)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        return str(caught.value), marker_of_latest(root)

    for message, marker in run_distributed(save_twice, 2):
        assert "samples-000000000016" in message
        assert marker == "at 8"


def test_kill_while_the_only_checkpoint_is_replaced_leaves_it_loadable(run_distributed, tmp_path):
    def kill():
        run = tiny_run.TinyRun(tmp_path, 0)
        root = tmp_path / "checkpoints"
        save(root, run, 16)
        original, calls = os.rename, []

        def rename(source, target):
            calls.append(source)
            if len(calls) == 2:
                raise KeyboardInterrupt
            original(source, target)

        os.rename = rename
        with pytest.raises(KeyboardInterrupt):
            save(root, run, 16)
        os.rename = original
        return names(root), checkpoint_folder.find(root, "auto")

    left, found = in_one_process(run_distributed, kill)
    assert found is not None, left


def test_process_killed_thirty_times_while_it_saves_leaves_a_loadable_latest(
    run_distributed, tmp_path
):
    root = tmp_path / "checkpoints"
    kills = 30

    def kill_while_saving():
        run = tiny_run.TinyRun(tmp_path, 0)
        start = time.monotonic()
        save(root, run, 8)
        seconds = time.monotonic() - start
        rng, found = random.Random(0), []
        for _ in range(kills):
            process = os.fork()
            if process == 0:
                samples = found_samples(root) + 8
                while True:  # until it is killed
                    save(root, run, samples)
                    samples += 8
            time.sleep(rng.uniform(0, 3 * seconds))
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            before = found_samples(root)
            assert marker_of_latest(root) == f"at {before}"
            checkpoint.load(checkpoint_folder.find(root, "auto"), run.engine, run.teacher, 1)
            found.append(before // 8)
        return found

    found = in_one_process(run_distributed, kill_while_saving)
    assert len(found) == kills
    assert found == sorted(found), "never an older one than before"
    assert found[-1] > kills / 3, "saves were finished between the kills"


def found_samples(root):
    return checkpoint_folder.num_samples(checkpoint_folder.find(root, "auto"))


def test_flipped_byte_in_the_manifest_is_refused(run_distributed, tmp_path):
    def save_one():
        return save(tmp_path / "checkpoints", tiny_run.TinyRun(tmp_path, 0), 16)

    folder = in_one_process(run_distributed, save_one)
    content = bytearray((folder / "manifest.json").read_bytes())
    content[0] ^= 1
    (folder / "manifest.json").write_bytes(bytes(content))
    with pytest.raises(ConfigError, match="manifest.json"):
        checkpoint.read_state(folder)


def test_checkpoint_without_a_teacher_is_refused_by_a_recipe_with_one(run_distributed, tmp_path):
    def save_without_teacher():
        run = tiny_run.TinyRun(tmp_path, 0, overrides=["mask.policy=attentive", "loss.byol=0"])
        run.teacher = None
        return save(tmp_path / "checkpoints", run, 16)

    def load_with_teacher():
        run = tiny_run.TinyRun(tmp_path, 0, overrides=["loss.byol=0"])
        folder = checkpoint_folder.find(tmp_path / "checkpoints", "auto")
        with pytest.raises(ConfigError, match="teacher"):
            checkpoint.load(folder, run.engine, run.teacher, 1)

    in_one_process(run_distributed, save_without_teacher)
    in_one_process(run_distributed, load_with_teacher)
