"""A locked tower, and an average of the weights without a teacher, through whole short runs."""

import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from trainer_run import BATCH, read_losses, train_in, write_shards

from aclip.training.teacher import Teacher
from aclip.weights.first_look import find_checkpoint

pytestmark = pytest.mark.distributed

STEPS, START = 4, 0.5
CLIP = ["mask.policy=none", "views.student=1", "loss.simclr=0", "loss.byol=0", "teacher=null"]
LENGTH = [f"train.epochs={STEPS * BATCH / 80}", "train.warmup_epochs=0", "train.keep_checkpoints=9"]
OVERRIDES = [*CLIP, *LENGTH, f"train.checkpoint_every={BATCH}", f"train.average={START}"]
LOCKED = ["optimizer.image={lr_scale: 0}", "optimizer.name=lion", "optimizer.lr=1e-3"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"))


def saved(run, step, name):
    return load_file(run / "checkpoints" / f"samples-{step * BATCH:012d}" / f"{name}.safetensors")


def train(run, shards, seen=None, **options):
    """A run in which the average may not see an image; `seen` gets what is evaluated."""

    def evaluator(models, mask_teacher, progress):
        assert mask_teacher is None
        (seen if seen is not None else []).append(list(models))
        return SimpleNamespace(metrics={}, picture=None, warning="")

    def forbidden(*args, **kwargs):
        raise AssertionError("the average costs no forward pass")

    def start():
        Teacher.forward = Teacher.encode_patches = forbidden
        train_in(run, shards, overrides=[*OVERRIDES, *LOCKED], evaluator=evaluator, **options)()
        return seen

    return start


def test_average_and_locked_tower_are_what_they_say_on_any_ranks_and_across_a_resume(
    run_distributed, shards, tmp_path
):
    whole, split = tmp_path / "whole", tmp_path / "split"
    evaluated = run_distributed(train(whole, shards, seen=[]), 1)[0]
    assert evaluated == [["student", "teacher"]] * 2, "before, and at the end"
    assert find_checkpoint(str(whole), None)[1] == "teacher", "what is exported"

    # The average by hand, from what the student was after each step.
    students = {step: saved(whole, step, "student") for step in range(1, STEPS + 1)}
    first, last = students[1], students[STEPS]
    for step in range(2, STEPS + 1):
        before, after = saved(whole, step - 1, "teacher"), saved(whole, step, "teacher")
        assert before.keys() == {n for n in first if not n.startswith("logit_scale.")}
        momentum = 1 - (1 - START) * 0.5 * (1 + math.cos(math.pi * (step - 1) / STEPS))
        for name, average in after.items():
            expected = momentum * before[name] + (1 - momentum) * students[step][name]
            torch.testing.assert_close(average, expected, rtol=1e-5, atol=1e-7)

    # The locked tower stays as it is, and has no state.
    optimizer = saved(whole, STEPS, "optimizer")
    for name in last:
        if name.endswith("k_proj.bias"):  # whose gradient is zero
            continue
        is_locked = name.startswith("image.")
        assert torch.equal(first[name], last[name]) == is_locked, name
        assert (f"{name}/exp_avg" in optimizer) != is_locked, name

    # Two ranks with ZeRO-3 and micro_steps, stopped, then one rank without ZeRO.
    run_distributed(train(split, shards, stage="3", micro_batch=4, stop_at=2), 2)
    run_distributed(train(split, shards, stage="0"), 1)
    assert read_losses(split) == pytest.approx(read_losses(whole), rel=1e-4)
    averages = saved(split, STEPS, "teacher")
    for name, average in saved(whole, STEPS, "teacher").items():
        apart = (averages[name] - average).abs() > 1e-5
        # Lion takes the sign, also of what is nothing but a rounding.
        assert apart.float().mean() < 0.01 or name.endswith("k_proj.bias"), name


@pytest.mark.parametrize("stage, name", [("1", "muon"), ("2", "adamw"), ("3_offload", "lion")])
def test_a_locked_tower_trains_under_the_other_stages(
    run_distributed, shards, tmp_path, stage, name
):
    losses = []
    split = {"stage": stage, "micro_batch": 8 if stage == "3_offload" else 4}
    for ranks, options in ((1, {}), (2, split)):
        run = tmp_path / str(ranks)
        overrides = [*CLIP, *LENGTH, "optimizer.image={lr_scale: 0}", f"optimizer.name={name}"]
        run_distributed(train_in(run, shards, overrides=overrides, **options), ranks)
        losses.append(read_losses(run))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
