"""A keep_ratio that changes over the run: what is kept when, and what all that plans is told."""

import math
from types import SimpleNamespace

import pytest
import torch
from recipe_refusal import refusal
from small_recipe import SMALL_RECIPE

from aclip.config.geometry import kept_blocks
from aclip.config.recipe import MaskConfig
from aclip.config.recipe_file import load_recipe
from aclip.data.synthetic import batch_of_mean_captions, synthetic_batch
from aclip.method.losses.term import Taught
from aclip.method.masks.policy import kept_patches
from aclip.planning.measure_step import measure_run, measure_step
from aclip.planning.step_kinds import describe_keep_ratio, step_kinds
from aclip.training.run_schedule import RunSchedule
from aclip.training.step_inputs import StepInputs

TINY = [
    "model.image.resolution=64",
    "model.image.kwargs={patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2}",
    "model.text={width: 16, heads: 2, layers: 1, context_length: 16}",
    "model.embed_dim=12",
    "train.global_batch_size=4",
]
RANDOM = [*TINY, "teacher=null", "loss.simclr=0", "loss.byol=0", "mask.policy=random"]
TO_ALL = ["mask.keep_ratio_end=1"]


@pytest.mark.parametrize(
    "shape, start, end, progress, expected",
    [
        ("linear", 0.5, 1.0, 0.0, 8),
        ("linear", 0.5, 1.0, 0.25, 10),  # 0.625 of 16
        ("linear", 0.5, 1.0, 0.26, 11),  # 10.08, rounded up
        ("linear", 0.5, 1.0, 0.999, 16),
        ("linear", 0.5, 1.0, 1.0, 16),
        ("linear", 1.0, 0.25, 0.5, 10),
        ("linear", 1.0, 0.25, 1.0, 4),
        ("cosine", 0.5, 1.0, 0.0, 8),
        ("cosine", 0.5, 1.0, 1 / 3, 10),  # (1 - cos 60 degrees) / 2 is a quarter
        ("cosine", 0.5, 1.0, 0.5, 12),
        ("cosine", 0.25, 1.0, 2 / 3, 13),  # three quarters of the way
        ("cosine", 0.5, 1.0, 1.0, 16),
        ("linear", 0.5, None, 0.7, 8),
        ("cosine", 0.5, 0.5, 0.7, 8),
    ],
)
def test_the_number_kept_goes_from_start_to_end(shape, start, end, progress, expected):
    mask = MaskConfig(keep_ratio=start, keep_ratio_end=end, keep_ratio_shape=shape, block_size=2)
    assert kept_blocks(mask, 8, progress) == expected


@pytest.mark.parametrize("policy", ["random", "gaussian", "cluster", "attentive", "inverse"])
@pytest.mark.parametrize("num_views", [1, 2])
def test_a_step_keeps_what_its_place_in_the_run_says(policy, num_views):
    teacher = ["teacher.resolution=64", "loss.simclr=0", "loss.byol=0"]
    recipe = load_recipe(
        SMALL_RECIPE,
        [*TINY, *TO_ALL, f"mask.policy={policy}", f"views.student={num_views}"]
        + (teacher if policy in ("attentive", "inverse") else RANDOM[len(TINY) : -1]),
    )
    batch = synthetic_batch(recipe, 4)
    image = SimpleNamespace(grid=8, patch_size=8)
    inputs = StepInputs(recipe, (), None, image, torch.device("cpu"), torch.float32)
    scores = torch.rand(4, 8, 8, generator=torch.Generator().manual_seed(0))
    schedule = RunSchedule(recipe, num_samples=32)
    found, last = [], None
    for step in (1, schedule.num_steps // 2 + 1, schedule.num_steps):
        given = inputs.student(batch, Taught(scores, None, None), {}, schedule.progress(step))
        ids = kept_patches(given.selection, 8)
        found.append(ids.shape[2] // 4)
        kept = [set(row) for row in ids.flatten(0, 1).tolist()]
        # What was kept stays, since scores and noise are the same.
        assert last is None or all(a <= b for a, b in zip(last, kept, strict=True))
        last = kept
    assert found == [8, 12, 16]
    assert [schedule.keep_ratio(1), schedule.keep_ratio(schedule.num_steps // 2 + 1)] == [0.5, 0.75]


def test_a_constant_ratio_is_not_logged():
    assert RunSchedule(load_recipe(SMALL_RECIPE, RANDOM), 32).keep_ratio(3) is None


def test_the_average_step_is_that_of_all_steps():
    recipe = load_recipe(SMALL_RECIPE, [*RANDOM, *TO_ALL, "mask.block_size=1", "train.epochs=1"])
    batch = batch_of_mean_captions(recipe, 8, 16, 2)
    num_samples = 4 * 9  # so many steps
    kinds = step_kinds(recipe, batch, num_samples)
    assert len(kinds) == 3 and sum(kind.share for kind in kinds) == pytest.approx(1)
    assert [kind.num_kept_blocks for kind in kinds][::2] == [61, 32]  # 32 + 32 * 8 / 9 is 60.4
    flops, largest = 0.0, None
    for step in range(9):
        measured = measure_step(recipe, batch, modes=("none",), progress=step / 9)
        flops += measured.total_flops / 9
        largest = measured
    of_run = measure_run(recipe, batch, num_samples, modes=("none",))
    assert of_run.total_flops == pytest.approx(flops, rel=1e-9)
    assert of_run.encoding["none"].kept == largest.encoding["none"].kept
    first = measure_step(recipe, batch, modes=("none",), progress=0.0)
    assert (
        first.total_flops < 0.9 * flops
        and first.encoding["none"].kept < largest.encoding["none"].kept
    )


@pytest.mark.parametrize("epochs, warmup, shape", [(3, 0.3, "cosine"), (4, 0.9, "linear")])
def test_shares_are_exact_for_numbers_and_their_squares_and_none_is_negative(epochs, warmup, shape):
    recipe = load_recipe(
        SMALL_RECIPE,
        [*TINY, "teacher.resolution=64", "loss.simclr=0", "loss.byol=0", "mask.block_size=1"]
        + [f"train.epochs={epochs}", f"mask.warmup={warmup}", "teacher.reuse=2"]
        + [*TO_ALL, f"mask.keep_ratio_shape={shape}"],
    )
    kinds = step_kinds(recipe, synthetic_batch(recipe, 4), num_samples=4 * 50)
    steps = [kept_blocks(recipe.mask, 8, step / (50 * epochs)) for step in range(50 * epochs)]
    assert 4 <= len(kinds) <= 6 < len(set(steps))
    for power in (0, 1, 2):
        average = sum(kind.share * kind.num_kept_blocks**power for kind in kinds)
        assert average == pytest.approx(sum(kept**power for kept in steps) / len(steps))
    assert min(kind.share for kind in kinds) >= 0
    assert kinds[0].num_kept_blocks == max(kind.num_kept_blocks for kind in kinds)


def test_kinds_of_step_join_the_teachers_rest_and_the_blocks():
    recipe = load_recipe(
        SMALL_RECIPE,
        [*TINY, "teacher.resolution=64", "loss.simclr=0", "loss.byol=0", "mask.warmup=0.5"]
        + ["mask.keep_ratio=0.25", "mask.keep_ratio_end=0.5", "train.epochs=1"],
    )
    kinds = step_kinds(recipe, synthetic_batch(recipe, 4), num_samples=4 * 8)
    # 4 to 8 of 16 blocks, rounded up; the teacher rests in the first four of eight steps.
    found = {(k.name, k.share, k.num_kept_blocks, k.batch.teacher_view is None) for k in kinds}
    assert found == {
        ("teaching step, 8 of 16 blocks", 0.125, 8, False),
        ("teaching step, 7 of 16 blocks", 0.25, 7, False),
        ("teaching step, 6 of 16 blocks", 0.125, 6, False),
        ("other step, 6 of 16 blocks", 0.125, 6, True),
        ("other step, 5 of 16 blocks", 0.25, 5, True),
        ("other step, 4 of 16 blocks", 0.125, 4, True),
    }
    for kind in kinds:
        assert kept_blocks(recipe.mask, 8, kind.progress) == kind.num_kept_blocks
        assert (kind.progress < recipe.mask.warmup) == (kind.batch.teacher_view is None)
    assert kinds[0].num_kept_blocks == 8
    assert (
        describe_keep_ratio(recipe) == "a view keeps 25% of its blocks at first and 50% at the end"
    )


def test_a_mask_that_keeps_everything_has_no_ratio_to_change():
    plain = ["mask.policy=none", "mask.keep_ratio=1", "mask.keep_ratio_end=0.5"]
    message = refusal(*plain, "teacher=null", "loss.simclr=0", "loss.byol=0")
    assert message == (
        "mask.keep_ratio_end is 0.5, but mask.policy none keeps every patch; set it to null, or "
        "take another mask.policy"
    )
    assert "mask.keep_ratio_end" in refusal("mask.keep_ratio_end=0")
    assert math.isclose(MaskConfig().keep_ratio, 0.5) and MaskConfig().keep_ratio_end is None
