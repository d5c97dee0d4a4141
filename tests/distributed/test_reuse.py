"""Scores that are kept from epoch to epoch: resumed in every phase, lost, and damaged."""

import json
from pathlib import Path

import pytest
import torch.distributed as dist
from trainer_run import BATCH, read_losses, run_trainer, write_shards

from aclip.method.masks.policy import kept_patches
from aclip.run_folder.metrics_file import read_metrics
from aclip.training.step_inputs import StepInputs

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
    f"train.checkpoint_every={2 * BATCH}",
]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"))[:3]


def train(run: Path, shards, overrides=(), **options) -> None:
    """Trains on this rank; rank 0 notes which patches each step keeps of the global batch."""
    kept, select = [], StepInputs.select

    def note(inputs, micro, pixels, scores, progress):
        selection = select(inputs, micro, pixels, scores, progress)
        ids = kept_patches(selection, 4, *pixels.shape[:2]).flatten(1).tolist()
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
    run_distributed, shards, tmp_path, capfd
):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_distributed(lambda: train(whole, shards), 2)
    taught = [line.taught for line in read_metrics(whole).steps]
    print(taught, (whole / "scores").iterdir())
    # In the warm-up, in the epoch that the teacher scores, in one that reads, at its leftovers.
    for ranks, kill_at in ((2, 2), (1, 6), (2, 9), (1, 16)):
        with pytest.raises(Exception):  # noqa: B017 - the ranks are gone, however it is reported
            run_distributed(lambda at=kill_at: train(killed, shards, kill_at=at), ranks)
    run_distributed(lambda: train(killed, shards), 2)
    print(capfd.readouterr().out)
    assert kept_of(killed) == kept_of(whole)
    assert read_losses(killed) == pytest.approx(read_losses(whole), rel=1e-5)
    print(taught)
