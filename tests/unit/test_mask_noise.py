"""Noise in masks that go by the teacher's scores: the warm-up, and drawing with a temperature."""

from itertools import permutations

import numpy as np
import pytest
import torch
from small_recipe import SMALL_RECIPE
from torch.utils._python_dispatch import TorchDispatchMode

from aclip.config.recipe_file import load_recipe
from aclip.data.synthetic import synthetic_batch
from aclip.method.masks.noise import noise_share
from aclip.method.masks.policies import POLICIES
from aclip.method.masks.policy import ViewsToMask, kept_patches, select_patches
from aclip.models.student import build_student
from aclip.training.step_inputs import StepInputs

SIGN = {"attentive": 1, "inverse": -1}
RECIPE = [
    "model.image.kwargs={patch_size: 8, embed_dim: 24, depth: 2, num_heads: 2}",
    "model.text={width: 16, heads: 2, layers: 1, context_length: 16}",
]


def random(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def views_of(grid, block_size, num_kept_blocks, num_views, batch=3, **more):
    """Views of the teacher's whole box, so that its scores are the views' without resampling."""
    box = torch.tensor([10, 20, grid, grid], dtype=torch.int32)
    side = grid // block_size
    given = {
        "noise": random(batch, num_views, side, side, seed=1),
        "teacher_scores": random(batch, grid, grid, seed=2),
        "teacher_box": box.repeat(batch, 1),
        "view_boxes": box.repeat(batch, num_views, 1),
    }
    return ViewsToMask(grid, num_kept_blocks, block_size, **given | more)


def kept_ids(policy, views):
    selection = select_patches(POLICIES[policy], views)
    return kept_patches(selection, views.grid)


def kept_by(numbers, num_kept_blocks, block_size):
    """The patches of the blocks with the highest of (B, V, g, g) numbers, by plain sorting."""
    side = numbers.shape[-1]
    ids = []
    for view in numbers.reshape(-1, side * side):
        best = sorted(range(side * side), key=lambda block: -view[block])[:num_kept_blocks]
        rows, columns = np.divmod(np.arange((side * block_size) ** 2), side * block_size)
        block_of = rows // block_size * side + columns // block_size
        ids.append(np.flatnonzero(np.isin(block_of, best)))
    return torch.from_numpy(np.stack(ids).reshape(*numbers.shape[:2], -1))


def block_means(views):
    """(B, V, g, g) of the teacher's scores, in float64."""
    side, block = views.grid // views.block_size, views.block_size
    means = views.teacher_scores.double().numpy().reshape(-1, 1, side, block, side, block)
    return np.repeat(means.mean((3, 5)), views.view_boxes.shape[1], axis=1)


@pytest.mark.parametrize(
    "progress, change, share",
    [
        (0.0, "at_once", 1.0),
        (0.19, "at_once", 1.0),
        (0.2, "at_once", 0.0),
        (0.0, "gradual", 1.0),
        (0.05, "gradual", 0.75),
        (0.15, "gradual", 0.25),
        (0.2, "gradual", 0.0),
        (1.0, "gradual", 0.0),
    ],
)
def test_noise_decides_alone_until_the_warm_up_is_over_or_less_and_less(progress, change, share):
    assert noise_share(progress, 0.2, change) == pytest.approx(share)
    assert noise_share(progress, 0.0, change) == 0


SHAPES = [(7, 1, 25, 2), (5, 1, 7, 1), (6, 2, 4, 2), (6, 2, 9, 1), (10, 2, 13, 2), (9, 3, 5, 1)]
"""Grid, block size, number of kept blocks, number of views."""


@pytest.mark.parametrize("policy", SIGN)
@pytest.mark.parametrize("grid, block_size, num_kept, num_views", SHAPES)
def test_noise_alone_is_the_random_mask_and_needs_no_scores(
    policy, grid, block_size, num_kept, num_views
):
    views = views_of(grid, block_size, num_kept, num_views, noise_share=1, teacher_scores=None)
    expected = kept_by(views.noise.numpy(), num_kept, block_size)
    assert torch.equal(kept_ids(policy, views), expected)
    assert torch.equal(kept_ids("random", views), expected)


@pytest.mark.parametrize("policy", SIGN)
@pytest.mark.parametrize("grid, block_size, num_kept, num_views", SHAPES)
def test_hardly_any_noise_changes_nothing(policy, grid, block_size, num_kept, num_views):
    views = views_of(grid, block_size, num_kept, num_views, noise_share=1e-6)
    expected = kept_by(SIGN[policy] * block_means(views), num_kept, block_size)
    assert torch.equal(kept_ids(policy, views), expected)
    # The lower index is kept first where scores are equal, as without noise.
    flat = views_of(grid, block_size, num_kept, num_views, noise_share=1e-6)
    flat.teacher_scores[:] = 0.25
    assert torch.equal(
        kept_ids(policy, flat), kept_by(0 * block_means(views), num_kept, block_size)
    )


@pytest.mark.parametrize("policy", SIGN)
@pytest.mark.parametrize("share", [0.25, 0.5, 0.9])
@pytest.mark.parametrize("grid, block_size, num_kept, num_views", SHAPES)
def test_ranks_and_noise_are_mixed_by_its_share(
    policy, share, grid, block_size, num_kept, num_views
):
    views = views_of(grid, block_size, num_kept, num_views, noise_share=share)
    means = SIGN[policy] * block_means(views)
    flat = means.reshape(*means.shape[:2], -1)
    num_below = (flat[..., None, :] < flat[..., :, None]).sum(-1)
    ranks = (num_below / flat.shape[-1]).reshape(means.shape)
    mixed = (1 - share) * ranks + share * views.noise.double().numpy()
    assert torch.equal(kept_ids(policy, views), kept_by(mixed, num_kept, block_size))


def test_blocks_are_ranked_in_each_view_by_what_it_sees_of_the_teachers_scores():
    """The teacher attends to its left half. One view sees the whole, the other the right half."""
    scores = torch.zeros(1, 8, 8)
    scores[0, :, :4] = torch.tensor([4.0, 3.0, 2.0, 1.0])
    boxes = torch.tensor([[[0, 0, 64, 64], [0, 32, 64, 32]]], dtype=torch.int32)
    views = views_of(
        8,
        2,
        8,
        2,
        batch=1,
        teacher_scores=scores,
        teacher_box=torch.tensor([[0, 0, 64, 64]], dtype=torch.int32),
        view_boxes=boxes,
        noise_share=0.1,  # less than what 8 ranks of 16 differ by
        noise=torch.zeros(1, 2, 4, 4),
    )
    whole, right = kept_ids("attentive", views)[0]
    assert set((whole % 8).tolist()) == {0, 1, 2, 3}
    # Only its first column of blocks is touched by the attention next door.
    assert {0, 1, 8, 9, 16, 17, 56, 57} <= set(right.tolist())


def inclusion(weights, num_kept):
    """How often each item is among the first `num_kept` that are drawn, one after the other, with
    odds of its weight among those that are left: a sum over all orders."""
    included = np.zeros(len(weights))
    for order in permutations(range(len(weights)), num_kept):
        probability, left = 1.0, sum(weights)
        for item in order:
            probability *= weights[item] / left
            left -= weights[item]
        included[list(order)] += probability
    return included


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("policy", SIGN)
def test_blocks_are_drawn_in_proportion_to_a_power_of_their_score(policy, temperature):
    num, scores = 20_000, [0.1, 0.2, 0.3, 0.4]
    views = views_of(
        2,
        1,
        2,
        1,
        batch=num,
        teacher_scores=torch.tensor(scores).view(1, 2, 2).repeat(num, 1, 1),
        temperature=temperature,
    )
    counts = np.bincount(kept_ids(policy, views).flatten(), minlength=4)
    weights = [score ** (SIGN[policy] / temperature) for score in scores]
    # Four standard errors of a share at most.
    assert counts / num == pytest.approx(inclusion(weights, 2), abs=4 * 0.5 / num**0.5)


@pytest.mark.parametrize("policy", SIGN)
@pytest.mark.parametrize("grid, block_size, num_kept, num_views", SHAPES)
def test_little_temperature_keeps_the_best(policy, grid, block_size, num_kept, num_views):
    views = views_of(grid, block_size, num_kept, num_views, temperature=1e-9)
    expected = kept_by(SIGN[policy] * block_means(views), num_kept, block_size)
    assert torch.equal(kept_ids(policy, views), expected)


def test_what_has_no_attention_is_drawn_last_and_noise_of_0_is_a_number():
    scores = torch.tensor([[0.0, 1e-6], [float("nan"), 1.0]]).expand(2, 2, 2)
    noise = torch.tensor([[[0.9, 0.0], [0.9, 0.0]], [[0.0, 0.9], [0.0, 0.9]]]).unsqueeze(1)
    views = views_of(2, 1, 2, 1, batch=2, teacher_scores=scores, noise=noise, temperature=1)
    assert kept_ids("attentive", views).tolist() == [[[1, 3]], [[1, 3]]]
    assert kept_ids("inverse", views).tolist() == [[[0, 2]], [[0, 2]]]


def test_the_warm_up_comes_before_the_temperature():
    warming = views_of(6, 2, 4, 2, noise_share=0.5)
    drawing = views_of(6, 2, 4, 2, noise_share=0.5, temperature=1)
    assert torch.equal(kept_ids("attentive", drawing), kept_ids("attentive", warming))


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


def select_in_a_step(overrides, progress):
    """(operations, kept ids) of the selection in a step of the small recipe."""
    recipe = load_recipe(SMALL_RECIPE, [*RECIPE, *overrides])
    inputs = StepInputs(
        recipe, (), None, build_student(recipe).image, torch.device("cpu"), torch.float32
    )
    batch = synthetic_batch(recipe, 4)
    with Operations() as operations:
        selection = inputs.select(batch, None, random(4, 8, 8), progress)
    return operations.seen, kept_patches(selection, 8)


@pytest.mark.parametrize("policy", SIGN)
@pytest.mark.parametrize("change", ["at_once", "gradual"])
def test_after_the_warm_up_a_step_is_what_it_would_be_without(policy, change):
    plain = [f"mask.policy={policy}"]
    warming = [*plain, "mask.warmup=0.25", f"mask.warmup_change={change}"]
    expected, expected_ids = select_in_a_step(plain, 0.0)
    operations, ids = select_in_a_step(warming, 0.25)
    assert operations == expected and torch.equal(ids, expected_ids)
    during, ids = select_in_a_step(warming, 0.2)
    assert during != expected and not torch.equal(ids, expected_ids)


def test_a_step_draws_with_the_recipes_temperature():
    best, drawn = (select_in_a_step([f"mask.temperature={value}"], 1.0)[1] for value in ("0", "1"))
    assert not torch.equal(best, drawn)
