"""Triton kernel of attentive_pack: selection and packing in one launch.

m row of patches (sample b, view v), p patch of P = G * G, s score of the teacher's S x S, j kept
patch of K, c channel of C. A block is BLOCK_SIZE x BLOCK_SIZE patches, SIDE blocks per side.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from aclip.kernels.common import INTERPRET, on_device_of

NUM_WARPS = 4
SCORE_LIMIT = tl.constexpr(1e30)


@triton.jit
def remap_matrix(
    start,
    length,
    outer_start,
    outer_length,
    S,
    G,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """[ROWS, COLUMNS]: share of score s in the mean over block i, along one axis.

    Patch -> two pixels of the view -> two scores of the teacher, as F.interpolate weighs them.
    """
    i = tl.arange(0, ROWS)
    s = tl.arange(0, COLUMNS)
    length = tl.maximum(length, 1)
    outer_length = tl.maximum(outer_length, 1)
    per_patch = length.to(tl.float32) / G
    per_pixel = S / outer_length.to(tl.float32)
    matrix = tl.zeros([ROWS, COLUMNS], tl.float32)
    for inner in tl.static_range(BLOCK_SIZE):
        position = tl.maximum((i * BLOCK_SIZE + inner + 0.5) * per_patch - 0.5, 0.0)
        lower = tl.floor(position)
        fraction = position - lower
        for tap in tl.static_range(2):
            pixel = tl.minimum(lower.to(tl.int32) + tap, length - 1) + start - outer_start
            inside = (pixel >= 0) & (pixel < outer_length)
            share = fraction if tap else 1.0 - fraction
            share = tl.where(inside, share / BLOCK_SIZE, 0.0)
            score_at = tl.maximum((pixel + 0.5) * per_pixel - 0.5, 0.0)
            score_at = tl.minimum(score_at, S - 1.0)
            # The hat is 1 - fraction at the lower score, fraction at the upper, 0 elsewhere.
            hat = tl.maximum(1.0 - tl.abs(score_at[:, None] - s[None, :]), 0.0)
            matrix += share[:, None] * hat
    return matrix


@triton.jit
def keep_best(values, valid, num_kept, SIZE: tl.constexpr):
    """int32 flags of the `num_kept` largest of [SIZE] values; among equals the first ones.

    Finds the smallest kept value four bits at a time: a rank would need SIZE x SIZE comparisons.
    """
    values = tl.where(values == 0.0, 0.0, values)  # -0.0 equals 0.0
    bits = values.to(tl.uint32, bitcast=True)
    # Unsigned integers in the order of the floats; 0, below all of them, marks the padding.
    ordered = tl.where(values < 0.0, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    ordered = tl.where(valid, ordered, 0)
    digits = tl.arange(0, 16).to(tl.uint32)
    threshold = tl.full([], 0, tl.uint32)
    for place in tl.static_range(8):
        candidates = threshold + (digits << (28 - 4 * place))
        count = tl.sum((ordered[:, None] >= candidates[None, :]).to(tl.int32), axis=0)
        threshold = tl.max(tl.where(count >= num_kept, candidates, threshold), axis=0)
    above = (ordered > threshold).to(tl.int32)
    equal = (ordered == threshold).to(tl.int32)
    wanted = num_kept - tl.sum(above, axis=0)
    return tl.where(tl.cumsum(equal, axis=0) <= wanted, above + equal, above)


@triton.jit
def attentive_pack_kernel(
    patches_ptr,  # (M, P, C), C contiguous
    cls_ptr,  # (C,)
    pos_ptr,  # (1+P, C)
    scores_ptr,  # (B, U, S, S)
    teacher_box_ptr,  # (B, 4) int32, or anything when not HAS_BOXES
    view_boxes_ptr,  # (B, V, 4) int32, or anything when not HAS_BOXES
    packed_ptr,  # (M, 1+K, C)
    keep_ids_ptr,  # (M, K) int64
    inverse_ptr,  # (M, P) int32
    stride_tm,
    stride_tp,
    V,
    G,
    S,
    C,
    num_kept_blocks,
    HAS_BOXES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_SIDE: tl.constexpr,  # SIDE, padded for tl.dot
    BLOCK_S: tl.constexpr,
    BLOCK_P: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    side = G // BLOCK_SIZE
    b = m // V

    y, x = tl.arange(0, BLOCK_S)[:, None], tl.arange(0, BLOCK_S)[None, :]
    score_map = b if HAS_BOXES else m
    scores = tl.load(
        scores_ptr + score_map * S * S + y * S + x, mask=(y < S) & (x < S), other=0.0
    ).to(tl.float32)
    scores = tl.where(scores == scores, scores, 0.0)  # NaN
    scores = tl.minimum(tl.maximum(scores, -SCORE_LIMIT), SCORE_LIMIT)
    if HAS_BOXES:
        view, outer = view_boxes_ptr + m * 4, teacher_box_ptr + b * 4
        down = remap_matrix(
            tl.load(view),
            tl.load(view + 2),
            tl.load(outer),
            tl.load(outer + 2),
            S,
            G,
            BLOCK_SIZE,
            BLOCK_SIDE,
            BLOCK_S,
        )
        across = remap_matrix(
            tl.load(view + 1),
            tl.load(view + 3),
            tl.load(outer + 1),
            tl.load(outer + 3),
            S,
            G,
            BLOCK_SIZE,
            BLOCK_SIDE,
            BLOCK_S,
        )
    else:
        i, s = tl.arange(0, BLOCK_SIDE), tl.arange(0, BLOCK_S)
        down = tl.where(i[:, None] == s[None, :] // BLOCK_SIZE, 1.0 / BLOCK_SIZE, 0.0)
        across = down
    # ieee: the order of blocks must not depend on TF32 rounding.
    rows = tl.dot(down, scores, input_precision="ieee")
    blocks = tl.dot(rows, tl.trans(across), input_precision="ieee")

    index = tl.arange(0, BLOCK_SIDE * BLOCK_SIDE)
    valid = (index // BLOCK_SIDE < side) & (index % BLOCK_SIDE < side)
    blocks = tl.reshape(blocks, [BLOCK_SIDE * BLOCK_SIDE])
    kept = keep_best(blocks, valid, num_kept_blocks, BLOCK_SIDE * BLOCK_SIDE)

    P = G * G
    K = num_kept_blocks * BLOCK_SIZE * BLOCK_SIZE
    p = tl.arange(0, BLOCK_P)
    block_of_p = p // G // BLOCK_SIZE * BLOCK_SIDE + p % G // BLOCK_SIZE
    block_of_p = tl.minimum(block_of_p, BLOCK_SIDE * BLOCK_SIDE - 1)
    kept_p = tl.where(p < P, tl.gather(kept, block_of_p, 0), 0)
    j_of_p = tl.where(kept_p > 0, tl.cumsum(kept_p, axis=0) - 1, -1)
    is_first = tl.program_id(1) == 0
    tl.store(inverse_ptr + m * P + p, j_of_p, mask=(p < P) & is_first)

    in_c = c < C
    packed_row = packed_ptr + m * (1 + K) * C
    cls = tl.load(cls_ptr + c, mask=in_c, other=0.0).to(tl.float32)
    cls += tl.load(pos_ptr + c, mask=in_c, other=0.0).to(tl.float32)
    tl.store(packed_row + c, cls.to(packed_ptr.dtype.element_ty), mask=in_c)
    for start in range(0, K, ROWS):
        j = start + tl.arange(0, ROWS)
        # The one patch that went to place j, found without a sort.
        ids = tl.sum(tl.where(j_of_p[None, :] == j[:, None], p[None, :], 0), axis=1)
        tl.store(keep_ids_ptr + m * K + j, ids.to(tl.int64), mask=(j < K) & is_first)
        mask = (j[:, None] < K) & in_c[None, :]
        source = patches_ptr + m * stride_tm + ids[:, None] * stride_tp + c[None, :]
        value = tl.load(source, mask=mask, other=0.0).to(tl.float32)
        value += tl.load(pos_ptr + (1 + ids[:, None]) * C + c[None, :], mask=mask, other=0.0).to(
            tl.float32
        )
        target = packed_row + (1 + j[:, None]) * C + c[None, :]
        tl.store(target, value.to(packed_ptr.dtype.element_ty), mask=mask)


def forward_blocks(grid: int, size: int, width: int, block_size: int) -> dict[str, int]:
    """Block sizes of `attentive_pack_kernel` for G, S, C; large ones where numpy interprets."""
    return {
        "BLOCK_SIZE": block_size,
        "BLOCK_SIDE": max(16, triton.next_power_of_2(grid // block_size)),
        "BLOCK_S": max(16, triton.next_power_of_2(size)),
        "BLOCK_P": triton.next_power_of_2(grid * grid),
        "ROWS": 128 if INTERPRET else 16,
        "BLOCK_C": min(triton.next_power_of_2(width), 1024 if INTERPRET else 256),
    }


def launch_attentive_pack(
    patches: Tensor,
    cls_token: Tensor,
    pos_embed: Tensor,
    scores: Tensor,
    teacher_box: Tensor | None,
    view_boxes: Tensor | None,
    num_kept_blocks: int,
    block_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """packed, keep_ids and the inverse map, as the op returns them."""
    rows, num_patches, width = patches.shape
    batch = scores.shape[0]
    views = scores.shape[1] if view_boxes is None else view_boxes.shape[1]
    grid = round(num_patches**0.5)
    kept = num_kept_blocks * block_size**2
    patches = patches if patches.stride(2) == 1 else patches.contiguous()
    scores = scores.contiguous()
    packed = patches.new_empty(rows, 1 + kept, width)
    keep_ids = torch.empty(batch, views, kept, dtype=torch.int64, device=patches.device)
    inverse = torch.empty(batch, views, num_patches, dtype=torch.int32, device=patches.device)
    if rows == 0:
        return packed, keep_ids, inverse
    blocks = forward_blocks(grid, scores.shape[-1], width, block_size)
    with on_device_of(patches):
        attentive_pack_kernel[(rows, triton.cdiv(width, blocks["BLOCK_C"]))](
            patches,
            cls_token.contiguous(),
            pos_embed.contiguous(),
            scores,
            inverse if teacher_box is None else teacher_box.contiguous(),
            inverse if view_boxes is None else view_boxes.contiguous(),
            packed,
            keep_ids,
            inverse,
            *patches.stride()[:2],
            views,
            grid,
            scores.shape[-1],
            width,
            num_kept_blocks,
            HAS_BOXES=view_boxes is not None,
            **blocks,
            num_warps=NUM_WARPS,
        )
    return packed, keep_ids, inverse
