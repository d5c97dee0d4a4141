"""Scores that are kept from epoch to epoch: resumed in every phase, lost, and damaged."""

import errno
import json
import os
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist
from trainer_run import BATCH, read_losses, run_trainer, write_shards

from aclip.data.stored_scores import HEADER_BYTES
from aclip.errors import NotWritten
from aclip.method.masks.policy import kept_patches
from aclip.run_folder.metrics_file import read_metrics
from aclip.training.step_inputs import StepInputs
from aclip.training.teacher import Teacher

pytestmark = pytest.mark.distributed

STEPS = 20
# Sixty samples in batches of sixteen leave some over in each epoch but the fourth. The epochs are
# 3, 4, 4, 4, 3 and 2 steps; the first two steps are the warm-up, so the second epoch is kept.
RECIPE = [
    "loss.simclr=0",
    "loss.byol=0",
    "teacher.reuse=2",
    "mask.warmup=0.1",
    f"train.epochs={STEPS * BATCH / 60}",
    f"train.checkpoint_every={4 * BATCH}",
]
RECORD = 4 * 4 + 8  # bytes: the teacher's grid is 4 x 4


@pytest.fixture(scope="module")
def all_shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture
def shards(all_shards):
    return all_shards[:3]


def train(run: Path, shards, overrides=(), **options) -> None:
    """Trains on this rank; rank 0 notes which patches each step keeps of the global batch."""
    kept, select = [], StepInputs.select

    def note(inputs, micro, pixels, scores, progress):
        selection = select(inputs, micro, pixels, scores, progress)
        ids = kept_patches(selection, 4).flatten(1).tolist()
        kept[:] = zip(micro.keys, ids, strict=True)
        return selection

    def write(step):
        of_ranks = [None] * dist.get_world_size()
        dist.all_gather_object(of_ranks, kept)
        if dist.get_rank() == 0:
            with open(run / "kept.jsonl", "a") as file:
                file.write(json.dumps([step, sum(of_ranks, [])]) + "\n")

    StepInputs.select = note
    try:
        run_trainer(run, shards, overrides=[*RECIPE, *overrides], on_step=write, **options)
    finally:
        StepInputs.select = select


def kept_of(run: Path) -> dict[int, list]:
    """The kept patches of each step's samples; a step that came again must have kept the same."""
    steps: dict[int, list] = {}
    for text in (run / "kept.jsonl").read_text().splitlines():
        step, kept = json.loads(text)
        assert steps.setdefault(step, kept) == kept, step
    return steps


def test_run_that_is_killed_in_every_phase_keeps_the_same_patches_on_other_ranks(
    run_distributed, shards, tmp_path
):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_distributed(lambda: train(whole, shards), 2)
    taught = [line.taught for line in read_metrics(whole).steps]
    # Two steps of warm-up, and one in which nothing is kept yet. The epoch that is kept leaves 120
    # mod 16 = 8 samples over, which come twice in the next one, 16 of 64. The fourth epoch ends
    # with the passes and leaves none.
    assert taught == [0] * 2 + [1] * 5 + [0.25] * 4 + [1] * 4 + [0] * 3 + [1] * 2
    # In the warm-up; where the teacher scores, and goes on; in two epochs that read, of which the
    # first one has scored and written what was left over by then.
    for ranks, kill_at in ((2, 2), (1, 7), (2, 11), (1, 18)):
        with pytest.raises(Exception):  # noqa: B017 - the ranks are gone, however it is reported
            run_distributed(lambda at=kill_at: train(killed, shards, kill_at=at), ranks)
    run_distributed(lambda: train(killed, shards), 2)
    assert kept_of(killed) == kept_of(whole)
    # The last two checkpoints lie in the epochs that read these.
    left = sorted(path.name for path in (whole / "scores").iterdir())
    assert left == ["epoch-00003.scores", "epoch-00005.scores"]
    assert read_losses(killed) == pytest.approx(read_losses(whole), rel=1e-5)


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[HEADER_BYTES + 10 * RECORD + 3] ^= 1
    path.write_bytes(content)


def lose_the_second_half(path):
    """As a kill in the middle of the epoch would leave it, had it not been gone through again."""
    content = path.read_bytes()
    half = HEADER_BYTES + 40 * RECORD
    path.write_bytes(content[:half] + bytes(len(content) - half))


FAULTS = {
    "nothing": (lambda path: None, 0, None, None),
    "a flipped byte": (flip_a_byte, 1, None, "(0 not written, 1 damaged)"),
    "half written": (lose_the_second_half, 40, None, "(40 not written, 0 damaged)"),
    "truncated": (
        lambda path: os.truncate(path, HEADER_BYTES + 60 * RECORD + 7),
        20,
        f"has {HEADER_BYTES + 60 * RECORD + 7:,} bytes instead of {HEADER_BYTES + 80 * RECORD:,}",
        "(19 not written, 1 damaged)",
    ),
    "missing": (Path.unlink, 80, "is missing", "(80 not written, 0 damaged)"),
    "of others": (
        lambda path: path.write_bytes(b"{" + bytes(path.stat().st_size - 1)),
        80,
        "does not begin with what it is of",
        "(80 not written, 0 damaged)",
    ),
}


def test_scores_that_are_lost_are_taught_anew_and_said(
    run_distributed, all_shards, tmp_path, capfd
):
    """Eighty samples: the first epoch, five steps, is scored; the next two read."""
    overrides = ["teacher.reuse=3", "mask.warmup=0", "train.epochs=4"]
    first = tmp_path / "first"

    def run_all():
        train(first, all_shards, overrides, stop_at=5)
        for number, (damage, *_) in enumerate(FAULTS.values()):
            run = tmp_path / str(number)
            shutil.copytree(first, run)
            damage(run / "scores" / "epoch-00000.scores")
            print(f"run {number}", flush=True)
            train(run, all_shards, overrides, stop_at=15)

    run_distributed(run_all, 1)
    said = capfd.readouterr().out.split("\nrun ")[1:]
    assert len(said) == len(FAULTS)
    for number, (_, lost, at_start, at_end) in enumerate(FAULTS.values()):
        taught = [line.taught for line in read_metrics(tmp_path / str(number)).steps]
        assert 16 * sum(taught[5:10]) == lost and taught[10:] == [0] * 5
        path = tmp_path / str(number) / "scores" / "epoch-00000.scores"
        lines = [line for line in said[number].splitlines() if line.startswith(str(path))]
        expected = []
        if at_start is not None:
            again = "the teacher scores the samples again whose scores are lost"
            expected.append(f"{path} {at_start}; {again}")
        if at_end is not None:
            expected.append(
                f"{path} lacked scores that epoch 1 was to read {at_end}; the teacher has scored "
                "these samples again"
            )
        assert lines == expected


def test_full_disk_ends_the_run_with_the_files_name_and_nothing_is_needed_without_reuse(
    run_distributed, shards, tmp_path, monkeypatch
):
    def run():
        train(tmp_path / "plain", shards, ["teacher.reuse=1"], stop_at=4)
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        monkeypatch.setattr(os, "pwrite", mock.Mock(side_effect=full))
        with pytest.raises(NotWritten, match="epoch-00001.scores can't be written .No space"):
            train(tmp_path / "full", shards)
        return sorted(path.name for path in (tmp_path / "plain").iterdir())

    (names,) = run_distributed(run, 1)
    assert "scores" not in names
    assert all(line.taught is None for line in read_metrics(tmp_path / "plain").steps)
    assert '"taught"' not in (tmp_path / "plain" / "metrics.jsonl").read_text()


def test_workers_micro_batches_and_crops_on_the_device_change_nothing(
    run_distributed, shards, tmp_path, monkeypatch
):
    """Workers run ahead into the next epoch, and wait there for what this one writes."""
    others = {
        "workers": {"overrides": ["data.workers=2"]},
        "micro": {"micro_batch": 4},
        "device": {"overrides": ["data.crops=device"]},
    }

    def run():
        forward, ran = Teacher.forward, []
        monkeypatch.setattr(Teacher, "forward", lambda *of: ran.append(len(of[1])) or forward(*of))
        train(tmp_path / "plain", shards, stop_at=18)
        rows = [sum(ran)]
        for name, options in others.items():
            ran.clear()
            options = {"overrides": [], **options}
            options["overrides"] = [*RECIPE, *options["overrides"]]
            run_trainer(tmp_path / name, shards, stop_at=18, **options)
            rows.append(sum(ran))
        return rows

    (rows,) = run_distributed(run, 1)
    # The teacher takes all samples in 5 steps up to the end of the kept epoch and in 4 of the next
    # kept epoch, and in 4 steps those alone that are left over.
    plain = read_metrics(tmp_path / "plain").steps
    assert rows == [round(16 * sum(line.taught for line in plain))] * 4
    assert 9 * 16 < rows[0] < 13 * 16
    losses = [line.terms["loss"] for line in plain]
    assert read_losses(tmp_path / "workers") == losses
    assert read_losses(tmp_path / "micro") == pytest.approx(losses, rel=1e-4)
    for name in others:
        of_other = read_metrics(tmp_path / name).steps
        assert [line.taught for line in of_other] == [line.taught for line in plain]
