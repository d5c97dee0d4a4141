"""Which blocks a policy keeps, against plain sorting of block scores."""

import numpy as np
import pytest
import torch

from aclip.config.geometry import kept_blocks
from aclip.config.recipe import MaskConfig
from aclip.kernels.attentive_pack import attentive_pack
from aclip.method.masks.policies import POLICIES
from aclip.method.masks.policy import MaskPolicy, ViewsToMask


def select(policy, num_kept_blocks, block_size, **views):
    noise = views.get("noise")
    grid = GRID if noise is None else noise.shape[-1] * block_size
    return POLICIES[policy].select(ViewsToMask(grid, num_kept_blocks, block_size, **views))


def kept_patches(selection, batch, num_views, grid):
    """What the student's op keeps: one set of patch ids per view, (batch, views)."""
    patches = grid * grid
    packed, keep_ids = attentive_pack(
        torch.arange(patches, dtype=torch.float32).view(1, -1, 1).repeat(batch * num_views, 1, 1),
        torch.zeros(1),
        torch.zeros(1 + patches, 1),
        selection.scores,
        selection.teacher_box,
        selection.view_boxes,
        selection.num_kept_blocks,
        selection.block_size,
    )
    # Each token holds its own id, so the packed rows must say the same as the ids.
    assert torch.equal(packed[:, 1:, 0].view(batch, num_views, -1), keep_ids.float())
    assert keep_ids.shape[-1] == selection.num_kept_blocks * selection.block_size**2
    return [[set(view.tolist()) for view in sample] for sample in keep_ids]


def best_patches(block_scores, num_kept_blocks, block_size):
    """The patches of the highest blocks of one view: (g, g) numpy scores to patch ids."""
    side = block_scores.shape[0]
    grid = side * block_size
    best = sorted(range(side * side), key=lambda b: -block_scores.flat[b])[:num_kept_blocks]
    return {
        (b // side * block_size + row) * grid + b % side * block_size + column
        for b in best
        for row in range(block_size)
        for column in range(block_size)
    }


@pytest.mark.parametrize(
    "grid, block_size, keep_ratio, expected",
    [
        (14, 2, 0.5, 25),  # 24.5 of 49
        (7, 1, 0.5, 25),
        (8, 2, 0.5, 8),  # exactly half of 16
        (4, 1, 0.5, 8),
        (14, 2, 1.0, 49),
        (8, 2, 0.01, 1),
        (16, 2, 0.25, 16),
        (10, 1, 0.3, 30),
        (10, 1, 0.07, 7),  # 0.07 * 100 is 7.000000000000001 in floats
        (5, 1, 0.28, 7),  # and so is 0.28 * 25
        (10, 1, 0.071, 8),  # 7.1 is rounded up
        (14, 2, 0.02, 1),
    ],
)
def test_count_of_kept_blocks_is_the_share_rounded_up(grid, block_size, keep_ratio, expected):
    mask = MaskConfig(block_size=block_size, keep_ratio=keep_ratio)
    assert {kept_blocks(mask, grid, progress) for progress in (0.0, 0.3, 1.0)} == {expected}


@pytest.mark.parametrize("block_size", [1, 2])
@pytest.mark.parametrize("num_kept_blocks", [1, 8, 16])
def test_random_policy_keeps_exactly_the_blocks_with_the_highest_noise(block_size, num_kept_blocks):
    noise = torch.rand(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    selection = select("random", num_kept_blocks, block_size, noise=noise)
    kept = kept_patches(selection, 3, 2, 4 * block_size)
    for sample in range(3):
        for view in range(2):
            expected = best_patches(noise[sample, view].numpy(), num_kept_blocks, block_size)
            assert kept[sample][view] == expected


# A teacher box as large as the score grid, seen by a view of the same box: no resampling at all.
GRID = 8


def same_box(batch, num_views):
    box = torch.tensor([10, 20, GRID, GRID], dtype=torch.int32)
    return {
        "teacher_box": box.repeat(batch, 1),
        "view_boxes": box.repeat(batch, num_views, 1),
    }


def block_means(scores, block_size):
    side = GRID // block_size
    return scores.reshape(side, block_size, side, block_size).mean(axis=(1, 3))


@pytest.mark.parametrize("block_size", [1, 2])
@pytest.mark.parametrize("policy, sign", [("attentive", 1), ("inverse", -1)])
def test_attentive_keeps_the_highest_blocks_and_inverse_the_lowest(policy, sign, block_size):
    scores = torch.rand(3, GRID, GRID, generator=torch.Generator().manual_seed(1))
    selection = select(policy, 5, block_size, teacher_scores=scores, **same_box(3, 2))
    kept = kept_patches(selection, 3, 2, GRID)
    for sample in range(3):
        blocks = block_means(scores[sample].double().numpy(), block_size)
        expected = best_patches(sign * blocks, 5, block_size)
        assert kept[sample] == [expected, expected]


def test_inverse_and_attentive_halves_make_the_whole():
    scores = torch.rand(2, GRID, GRID, generator=torch.Generator().manual_seed(2))
    halves = [
        kept_patches(select(policy, 8, 2, teacher_scores=scores, **same_box(2, 1)), 2, 1, GRID)
        for policy in ("attentive", "inverse")
    ]
    for sample in range(2):
        best, worst = halves[0][sample][0], halves[1][sample][0]
        assert best.isdisjoint(worst)
        assert best | worst == set(range(GRID * GRID))


def test_view_of_one_corner_sees_that_corner_alone():
    # The teacher attends to its upper left quarter, and there most to the left columns.
    scores = torch.zeros(1, GRID, GRID)
    scores[0, :4, :4] = torch.tensor([4.0, 3.0, 2.0, 1.0])
    corners = torch.tensor([[[0, 0, 32, 32], [32, 32, 32, 32]]], dtype=torch.int32)
    teacher_box = torch.tensor([[0, 0, 64, 64]], dtype=torch.int32)
    selection = select(
        "attentive", 8, 2, teacher_scores=scores, teacher_box=teacher_box, view_boxes=corners
    )
    kept = kept_patches(selection, 1, 2, GRID)[0]
    left_half = {row * GRID + column for row in range(GRID) for column in range(GRID // 2)}
    assert kept[0] == left_half
    # Only its first block is touched by the attention next door; the rest ties at 0, and the lower
    # index wins: the upper half.
    assert kept[1] == set(range(GRID * GRID // 2))


def test_no_policy_selects_nothing():
    assert select("none", 5, 2) is None


def test_scores_of_the_teacher_carry_no_gradient():
    scores = torch.rand(1, GRID, GRID, requires_grad=True)
    selection = select("attentive", 5, 2, teacher_scores=scores, **same_box(1, 1))
    assert not selection.scores.requires_grad


def test_kept_patches_are_counted_in_patches():
    selection = select("random", 25, 2, noise=torch.from_numpy(np.zeros((1, 1, 7, 7), np.float32)))
    assert len(kept_patches(selection, 1, 1, 14)[0][0]) == 100
    assert selection.scores.shape == (1, 1, 14, 14)


def test_policy_may_score_the_pixels_of_the_views():
    pixels = torch.zeros(2, 1, 3, 16, 16)
    pixels[0, :, :, 8:, :8] = 1.0  # of 4 x 4 patches, the lower left four
    pixels[1, :, :, :8, 8:] = 1.0  # the upper right four

    def brightest(views: ViewsToMask):
        side = views.pixels.shape[-1] // views.grid
        patches = views.pixels.unfold(3, side, side).unfold(4, side, side)  # (B, V, 3, G, G, p, p)
        return views.by_patch(patches.mean((2, 5, 6)))

    policy = MaskPolicy("brightest", brightest, reads_pixels=True)
    selection = policy.select(ViewsToMask(4, 1, 2, pixels=pixels))
    assert kept_patches(selection, 2, 1, 4) == [[{8, 9, 12, 13}], [{2, 3, 6, 7}]]


@pytest.mark.parametrize("corner_noise, kept", [(0.78, {4}), (0.80, {0})])
def test_gaussian_policy_adds_the_density_of_the_place_to_the_noise(corner_noise, kept):
    # Of N(0, 0.2 I): 1 / (0.4 pi) = 0.79577 in the middle of 3 x 3, 0.00536 in a corner. So a
    # corner needs 0.79041 more noise than the middle.
    noise = torch.zeros(1, 1, 3, 3)
    noise[0, 0, 0, 0] = corner_noise
    assert kept_patches(select("gaussian", 1, 1, noise=noise), 1, 1, 3) == [[kept]]


def test_gaussian_policy_keeps_its_number_of_blocks_and_the_middle_more_often():
    noise = torch.rand(200, 2, 7, 7, generator=torch.Generator().manual_seed(0))
    kept = kept_patches(select("gaussian", 25, 2, noise=noise), 200, 2, 14)
    counts = np.zeros(14 * 14)
    for sample in kept:
        for view in sample:
            assert len(view) == 100
            counts[list(view)] += 1
    shares = counts.reshape(14, 14) / 400
    assert shares[6:8, 6:8].min() > 0.8 > 0.5 > shares[[0, 0, -1, -1], [0, -1, 0, -1]].max()
