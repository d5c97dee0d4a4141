"""What ends with a stage that another one follows: its scores, and at SIGTERM the run."""

import os
import signal
from types import SimpleNamespace

import pytest
from trainer_run import BATCH, run_trainer, write_shards

from aclip.training.stage import FIRST_STAGE, StagePlace

pytestmark = pytest.mark.distributed

RECIPE = ["loss.simclr=0", "loss.byol=0", "teacher.reuse=2", "train.warmup_epochs=0"]
RECIPE += ["mask.warmup=0", "train.epochs=0.6"]
FOLLOWED = StagePlace(rest_samples=BATCH, rest_steps=1)


def evaluation():
    return SimpleNamespace(metrics={"student": {"zero_shot_top1": 0.5}}, picture=None, warning="")


@pytest.mark.parametrize("place", [FIRST_STAGE, FOLLOWED], ids=["the last", "followed"])
def test_a_signal_in_the_last_evaluation_ends_the_run_behind_a_stage(
    run_distributed, tmp_path, place
):
    shards, run = write_shards(tmp_path), tmp_path / "run"

    def train():
        calls = []

        def evaluate(*_):
            calls.append(1)
            if len(calls) == 2 and os.environ["RANK"] == "1":  # the first was before the training
                os.kill(os.getpid(), signal.SIGTERM)
            return evaluation()

        return run_trainer(run, shards, overrides=RECIPE, evaluator=evaluate, place=place)

    assert run_distributed(train, 2) == [place is FIRST_STAGE] * 2
    assert (run / "checkpoints" / f"samples-{3 * BATCH:012d}" / "state.json").is_file()


@pytest.mark.parametrize("place", [FIRST_STAGE, FOLLOWED], ids=["the last", "followed"])
def test_scores_are_kept_for_a_longer_run_but_not_for_the_next_stage(
    run_distributed, tmp_path, place
):
    shards, run = write_shards(tmp_path), tmp_path / "run"
    assert run_distributed(lambda: run_trainer(run, shards, overrides=RECIPE, place=place), 1) == [
        True
    ]
    assert any((run / "scores").glob("*.scores")) is (place is FIRST_STAGE)
