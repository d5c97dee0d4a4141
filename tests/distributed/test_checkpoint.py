"""Checkpoints: what is saved comes back, damage is named, a kill at any moment costs one save."""

import json
import os
import shutil
from pathlib import Path

import pytest
import tiny_run
import torch
import torch.distributed as dist

from aclip.errors import ConfigError
from aclip.run_folder import checkpoint_folder
from aclip.training import checkpoint

pytestmark = pytest.mark.distributed


TENSORS = ("student", "optimizer", "teacher", "rng")
FILES = {*(f"{name}.safetensors" for name in TENSORS), "state.json"}


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


def test_saved_run_loads_into_a_fresh_engine_of_another_stage(run_distributed, tmp_path):
    def save_after_steps():
        run = tiny_run.TinyRun(tmp_path, 2)
        for step in range(2):
            run.step(step)
            run.teacher.update(run.engine.module, 0.5)
        torch.manual_seed(123 + dist.get_rank())
        folder = save(tmp_path / "checkpoints", run, 16)
        after = (torch.rand(3), run.gathered(), dict(run.teacher.state_dict()))
        return folder, after, run.step(2)

    def load_and_go_on():
        run = tiny_run.TinyRun(tmp_path, 3, overrides=["train.seed=1"])
        folder = checkpoint_folder.find(tmp_path / "checkpoints", "auto")
        state = checkpoint.read_state(folder)
        checkpoint.load(folder, run.engine, run.teacher, state["step"])
        after = (torch.rand(3), run.gathered(), dict(run.teacher.state_dict()))
        return folder, after, run.step(2), state

    saved = run_distributed(save_after_steps, 2)
    loaded = run_distributed(load_and_go_on, 2)
    for (folder, after, loss), (found, after_load, loss_after_load, state) in zip(
        saved, loaded, strict=True
    ):
        assert found == folder == tmp_path / "checkpoints/samples-000000000016"
        assert state == {"samples": 16, "step": 2, "marker": "at 16"}
        assert torch.equal(after[0], after_load[0])  # each rank's own random numbers
        for tensors, loaded_tensors in zip(after[1:], after_load[1:], strict=True):
            assert tensors.keys() == loaded_tensors.keys()
            assert all(torch.equal(tensors[key], loaded_tensors[key]) for key in tensors)
        assert loss_after_load == pytest.approx(loss, rel=1e-6)
    assert not torch.equal(saved[0][1][0], saved[1][1][0])
    assert names(tmp_path / "checkpoints") == ["latest", "samples-000000000016"]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest.keys() == FILES
    assert {path.name for path in folder.iterdir()} == FILES | {"manifest.json"}


def test_damage_is_refused_with_the_files_name_and_the_other_checkpoint_is_offered(
    run_distributed, tmp_path
):
    def save_two():
        run = tiny_run.TinyRun(tmp_path, 0)
        save(tmp_path / "checkpoints", run, 8)
        save(tmp_path / "checkpoints", run, 16)

    in_one_process(run_distributed, save_two)
    newest, other = (tmp_path / "checkpoints" / f"samples-0000000000{n}" for n in ("16", "08"))
    assert checkpoint_folder.find(newest.parent, "auto") == newest
    for name in FILES:
        path = newest / name
        whole = path.read_bytes()
        middle = len(whole) // 2
        for content, reason in (
            (whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :], "checksum"),
            (whole[:-1], "bytes"),
            (None, "missing"),
        ):
            path.unlink() if content is None else path.write_bytes(content)
            with pytest.raises(ConfigError) as caught:
                checkpoint.read_state(newest)
            message = str(caught.value)
            assert f"{name} " in message
            assert reason in message
            assert str(newest) in message
            assert f"--resume {other}" in message
        path.write_bytes(whole)
    assert checkpoint.read_state(newest)["marker"] == "at 16"

    shutil.rmtree(other)
    (newest / "state.json").unlink()
    with pytest.raises(ConfigError, match="start with --resume none"):
        checkpoint.read_state(newest)


def test_resume_argument_names_a_checkpoint_a_run_or_nothing(run_distributed, tmp_path):
    root = tmp_path / "run" / "checkpoints"
    assert checkpoint_folder.find(root, "auto") is None

    def save_two():
        run = tiny_run.TinyRun(tmp_path, 0)
        save(root, run, 8)
        save(root, run, 16)

    in_one_process(run_distributed, save_two)
    first, second = root / "samples-000000000008", root / "samples-000000000016"
    elsewhere = tmp_path / "elsewhere"
    assert checkpoint_folder.find(root, "auto") == second
    assert checkpoint_folder.find(root, "none") is None
    assert checkpoint_folder.find(elsewhere, str(first)) == first
    assert checkpoint_folder.find(elsewhere, str(root)) == second
    assert checkpoint_folder.find(elsewhere, str(tmp_path / "run")) == second
    for path in (tmp_path, elsewhere, first / "state.json"):
        with pytest.raises(ConfigError) as caught:
            checkpoint_folder.find(root, str(path))
        assert str(caught.value).startswith(f"--resume is {path},")

    # `latest` that was lost or names nothing: the newest complete folder stands in.
    (root / "latest").write_text("")
    assert checkpoint_folder.find(root, "auto") == second
    shutil.rmtree(second)
    (root / "latest").write_text(second.name)
    assert checkpoint_folder.find(root, "auto") == first


def test_newest_checkpoints_stay_and_stale_partial_ones_go(run_distributed, tmp_path):
    root = tmp_path / "checkpoints"

    def save_many():
        run = tiny_run.TinyRun(tmp_path, 0)
        seen = []
        for samples in (8, 16, 24, 32):
            stale = root / "samples-000000000099.tmp"
            stale.mkdir(parents=True)
            (stale / "manifest.json").write_text("{}")
            if samples > 8:
                assert marker_of_latest(root) == f"at {samples - 8}"  # the stale one is not it
            save(root, run, samples, keep=3)
            seen.append((names(root), marker_of_latest(root)))
        save(root, run, 40, keep=1)
        return seen, names(root)

    seen, last = in_one_process(run_distributed, save_many)
    folder = "samples-0000000000{:02d}".format
    assert seen == [
        (["latest", folder(8)], "at 8"),
        (["latest", folder(8), folder(16)], "at 16"),
        (["latest", folder(8), folder(16), folder(24)], "at 24"),
        (["latest", folder(16), folder(24), folder(32)], "at 32"),
    ]
    assert last == ["latest", folder(40)]


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the code under test handles it."""


class KillSwitch:
    """Counts the file operations of a save and raises before or after the one it is set to."""

    OPERATIONS = (
        (os, "rename"),
        (os, "replace"),
        (os, "fsync"),
        (checkpoint, "save_file"),
        (Path, "write_text"),
        (Path, "write_bytes"),
        (Path, "mkdir"),
        (shutil, "rmtree"),
    )

    def __init__(self, kill_at):
        self.kill_at, self.count = kill_at, 0

    def __enter__(self):
        self.originals = [getattr(owner, name) for owner, name in self.OPERATIONS]
        for (owner, name), original in zip(self.OPERATIONS, self.originals, strict=True):
            setattr(owner, name, self._watched(original))
        return self

    def __exit__(self, *_):
        for (owner, name), original in zip(self.OPERATIONS, self.originals, strict=True):
            setattr(owner, name, original)

    def _watched(self, original):
        def operation(*args, **kwargs):
            self._tick()
            result = original(*args, **kwargs)
            self._tick()
            return result

        return operation

    def _tick(self):
        if self.count == self.kill_at:
            raise Killed
        self.count += 1


@pytest.mark.parametrize("again", [False, True], ids=["a new number of samples", "the same again"])
def test_kill_between_any_two_file_operations_leaves_a_loadable_latest(
    again, run_distributed, tmp_path
):
    """`again`: the run went on from an older checkpoint and reaches the newest one once more."""

    def kill_everywhere():
        run = tiny_run.TinyRun(tmp_path, 0)
        origin, root = tmp_path / "origin", tmp_path / "checkpoints"
        save(origin, run, 8)
        save(origin, run, 16)
        outcomes = []
        while not outcomes or outcomes[-1] != "finished":
            shutil.rmtree(root, ignore_errors=True)
            shutil.copytree(origin, root)
            state = {"samples": 16 if again else 24, "step": 3, "marker": "new"}
            try:
                with KillSwitch(len(outcomes)):
                    run.save(root, state)
                outcomes.append("finished")
            except Killed:
                folder = checkpoint_folder.find(root, "auto")
                assert folder is not None, f"nothing to resume after a kill at {len(outcomes)}"
                outcomes.append(checkpoint.read_state(folder)["marker"])
                if len(outcomes) % 5 == 0:
                    checkpoint.load(folder, run.engine, run.teacher, 2)
            # The next save finishes whatever was left behind.
            run.save(root, {**state, "marker": "next"})
            assert marker_of_latest(root) == "next"
            assert not [name for name in names(root) if name.endswith(".tmp")]
            assert len(names(root)) == 3  # two checkpoints and `latest`
        return outcomes

    outcomes = in_one_process(run_distributed, kill_everywhere)
    assert len(outcomes) > 30
    assert outcomes[-1] == "finished"
    # First the old one is found, at the end the new one, with no way back.
    kills = outcomes[:-1]
    old = {"at 16"} if not again else {"at 16", "at 8"}
    first_new = kills.index("new")
    assert set(kills[:first_new]) <= old
    assert set(kills[first_new:]) == {"new"}


def test_other_shapes_are_refused_by_name_and_nothing_is_loaded(run_distributed, tmp_path):
    root = tmp_path / "checkpoints"

    def save_one():
        save(root, tiny_run.TinyRun(tmp_path, 0), 8)

    def load_into(override):
        run = tiny_run.TinyRun(tmp_path, 3, overrides=[override, "train.seed=1"])
        before = run.weights()
        folder = checkpoint_folder.find(root, "auto")
        with pytest.raises(ConfigError) as caught:
            checkpoint.load(folder, run.engine, run.teacher, 1)
        after = run.weights()
        assert all(torch.equal(before[name], after[name]) for name in before)
        return str(caught.value)

    in_one_process(run_distributed, save_one)
    for override, named, shapes in (
        ("model.embed_dim=13", "image_projection.weight", ("[11, 24]", "[13, 24]")),
        ("loss.simclr=0", "simclr_head.0.weight", ("[21, 24]", "none")),
        ("model.text.layers=2", "text.transformer", ("absent",)),
    ):
        for message in run_distributed(load_into, 2, override):
            assert "\n" not in message
            assert named in message
            assert all(shape in message for shape in shapes)
            assert "--resume" in message
