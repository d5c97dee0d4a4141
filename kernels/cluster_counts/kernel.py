"""Triton kernel of cluster_counts: a program counts for one row of a view's patches.

m view, g patch of the G in the program's row, a anchor of A, x column of a patch. A line is one row
of pixels of one channel within a patch; a patch has 3 * PATCH lines.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from aclip.kernels.common import on_device_of

NUM_WARPS = 1
BLOCK_A = 16
"""Anchors at a time, the fewest that tl.dot takes; 3 % of 14 x 14 patches are 6."""


@triton.jit
def cluster_counts_kernel(
    views_ptr,  # (M, 3, R, R), contiguous
    anchors_ptr,  # (M, A) int64
    counts_ptr,  # (M, G * G) int32
    A,
    G,
    R,
    threshold,
    PATCH: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_A: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1)
    g = tl.arange(0, BLOCK_G)
    x = tl.arange(0, BLOCK_X)
    a = tl.arange(0, BLOCK_A)
    view = views_ptr + m * 3 * R * R
    of_g = view + row * PATCH * R + g * PATCH
    in_g = (g[:, None] < G) & (x[None, :] < PATCH)
    # Values count from a patch's first one, so that equal ones are exactly 0.
    first_g = tl.load(of_g, mask=g < G, other=0.0).to(tl.float32)[:, None]
    mean_g = tl.zeros([BLOCK_G], tl.float32)
    for line in range(3 * PATCH):
        offset = line // PATCH * R * R + line % PATCH * R
        values = tl.load(of_g[:, None] + offset + x[None, :], mask=in_g, other=0.0).to(tl.float32)
        mean_g += tl.sum(tl.where(in_g, values - first_g, 0.0), axis=1)
    mean_g = mean_g[:, None] / (3 * PATCH * PATCH)

    counts = tl.zeros([BLOCK_G], tl.int32)
    for start in range(0, A, BLOCK_A):
        is_anchor = start + a < A
        ids = tl.load(anchors_ptr + m * A + start + a, mask=is_anchor, other=0).to(tl.int32)
        of_a = view + ids // G * PATCH * R + ids % G * PATCH
        in_a = (x[:, None] < PATCH) & is_anchor[None, :]
        first_a = tl.load(of_a, mask=is_anchor, other=0.0).to(tl.float32)[None, :]
        mean_a = tl.zeros([BLOCK_A], tl.float32)
        for line in range(3 * PATCH):
            offset = line // PATCH * R * R + line % PATCH * R
            values = tl.load(of_a[None, :] + offset + x[:, None], mask=in_a, other=0.0)
            mean_a += tl.sum(tl.where(in_a, values.to(tl.float32) - first_a, 0.0), axis=0)
        mean_a = mean_a[None, :] / (3 * PATCH * PATCH)

        dots = tl.zeros([BLOCK_G, BLOCK_A], tl.float32)
        squares_g = tl.zeros([BLOCK_G], tl.float32)
        squares_a = tl.zeros([BLOCK_A], tl.float32)
        for line in range(3 * PATCH):
            offset = line // PATCH * R * R + line % PATCH * R
            rows = tl.load(of_g[:, None] + offset + x[None, :], mask=in_g, other=0.0)
            rows = tl.where(in_g, rows.to(tl.float32) - first_g - mean_g, 0.0)
            columns = tl.load(of_a[None, :] + offset + x[:, None], mask=in_a, other=0.0)
            columns = tl.where(in_a, columns.to(tl.float32) - first_a - mean_a, 0.0)
            # ieee: what is in a cluster must not depend on TF32 rounding.
            dots += tl.dot(rows, columns, input_precision="ieee")
            squares_g += tl.sum(rows * rows, axis=1)
            squares_a += tl.sum(columns * columns, axis=0)
        norms = tl.sqrt(squares_g)[:, None] * tl.sqrt(squares_a)[None, :]
        similarity = dots / tl.where(norms > 0.0, norms, 1.0)
        counts += tl.sum(((similarity > threshold) & is_anchor[None, :]).to(tl.int32), axis=1)
    tl.store(counts_ptr + m * G * G + row * G + g, counts, mask=g < G)


def block_sizes(grid: int, patch_size: int) -> dict[str, int]:
    """Block sizes of `cluster_counts_kernel`: a whole row of patches, a line of each at a time."""
    return {
        "PATCH": patch_size,
        "BLOCK_G": max(16, triton.next_power_of_2(grid)),
        "BLOCK_X": max(16, triton.next_power_of_2(patch_size)),
        "BLOCK_A": BLOCK_A,
    }


def launch_cluster_counts(
    views: Tensor, anchors: Tensor, patch_size: int, threshold: float
) -> Tensor:
    """Reads each pixel once from memory; a second time, and the anchors', from the cache."""
    num_views, side = views.shape[0], views.shape[3]
    grid = side // patch_size
    counts = torch.empty(num_views, grid * grid, dtype=torch.int32, device=views.device)
    if counts.numel() == 0:
        return counts
    with on_device_of(views):
        cluster_counts_kernel[(num_views, grid)](
            views.contiguous(),
            anchors.contiguous(),
            counts,
            anchors.shape[1],
            grid,
            side,
            threshold,
            **block_sizes(grid, patch_size),
            num_warps=NUM_WARPS,
        )
    return counts
