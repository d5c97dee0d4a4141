"""attentive_pack in plain torch: the public meaning of the op, and its path on CPU.

B samples, V views, G patches per side of a view, P = G * G, S scores per side, K kept patches,
C width.
"""

import torch
from torch import Tensor

SCORE_LIMIT = 1e30
"""Stands for infinity: 0 * inf in the remap would turn a whole row into NaN."""


def attentive_pack_reference(
    patches: Tensor,
    cls_token: Tensor,
    pos_embed: Tensor,
    scores: Tensor,
    teacher_box: Tensor | None,
    view_boxes: Tensor | None,
    num_kept_blocks: int,
    block_size: int,
) -> tuple[Tensor, Tensor]:
    """Keeps the best-scored blocks of patches of every view and packs them for the ViT.

    Args:
        patches: (B*V, P, C) float, patch embeddings; row b*V + v is view v of sample b.
        cls_token: (C,) float.
        pos_embed: (1+P, C) float, row 0 for the CLS token.
        scores: (B, U, S, S) float. With boxes, U = 1: the teacher's score of each patch of the
            teacher crop. Without boxes, U = V and S = G: scores on each view's own patch grid.
        teacher_box: (B, 4) int32 (top, left, height, width) in source pixels, or None.
        view_boxes: (B, V, 4) int32, same convention, or None. Parts of a view outside the teacher
            crop score zero.
        num_kept_blocks: blocks of block_size x block_size patches that each view keeps.
        block_size: patches per side of a block; divides G.

    Returns:
        packed: (B*V, 1+K, C), dtype of patches. Row 0 is cls_token + pos_embed[0], row 1+j is
            patches[keep_ids[j]] + pos_embed[1 + keep_ids[j]]; summed in fp32, rounded once.
        keep_ids: (B, V, K) int64, ascending, K = num_kept_blocks * block_size**2.

    Source: A-CLIP, arXiv:2212.08653; microsoft/A-CLIP models.py `get_mask`, which resizes, crops
        and sorts in a loop over samples. Each of its two bilinear steps is linear and separable, so
        two small matrices a view do the batch here. Blocks are ordered by (score descending, index
        ascending); NaN counts as 0, +-inf as +-1e30.
    """
    num_rows, num_patches, width = patches.shape
    grid = grid_side(num_patches)
    blocks = block_scores(scores, teacher_box, view_boxes, grid, block_size)
    keep_ids = best_patches(blocks, num_kept_blocks, block_size)

    ids = keep_ids.flatten(0, 1)
    kept = patches.gather(1, ids.unsqueeze(-1).expand(-1, -1, width))
    packed = patches.new_empty(num_rows, 1 + ids.shape[1], width)
    packed[:, 0] = (cls_token.float() + pos_embed[0].float()).to(patches.dtype)
    packed[:, 1:] = (kept.float() + pos_embed[1:].float()[ids]).to(patches.dtype)
    return packed, keep_ids


def inverse_map(keep_ids: Tensor, num_patches: int) -> Tensor:
    """(B, V, P) int32: the j with keep_ids[..., j] == p, or -1 for a dropped patch."""
    rank = torch.arange(keep_ids.shape[2], dtype=torch.int32, device=keep_ids.device)
    inverse = keep_ids.new_full((*keep_ids.shape[:2], num_patches), -1, dtype=torch.int32)
    return inverse.scatter_(2, keep_ids, rank.expand_as(keep_ids))


def attentive_pack_backward_reference(
    grad_packed: Tensor,
    inverse: Tensor,
    grad_patches: bool,
    grad_cls: bool,
    grad_pos: bool,
    pos_dtype: torch.dtype,
    cls_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of attentive_pack; one that is not asked for comes back with no elements.

    Args:
        grad_packed: (B*V, 1+K, C) float.
        inverse: (B, V, P) int32, from `inverse_map`.
        grad_patches, grad_cls, grad_pos: whether that input needs a gradient.
        pos_dtype, cls_dtype: dtypes of the inputs.

    Returns:
        d_patches (B*V, P, C), zero where dropped; d_cls (C,); d_pos (1+P, C). Sums over samples
        run in fp32, without atomics, in one fixed order.
    """
    width = grad_packed.shape[-1]
    rows = inverse.flatten(0, 1)
    d_patches = grad_packed.new_empty(0)
    d_cls = grad_packed.new_empty(0, dtype=cls_dtype)
    d_pos = grad_packed.new_empty(0, dtype=pos_dtype)
    first = grad_packed[:, 0].sum(0, dtype=torch.float32)
    if grad_cls:
        d_cls = first.to(cls_dtype, copy=True)
    if grad_patches or grad_pos:
        index = (rows.long() + 1).unsqueeze(-1)
        at_patches = grad_packed.gather(1, index.expand(-1, -1, width))
        at_patches = at_patches.masked_fill_(rows.unsqueeze(-1) < 0, 0)
        if grad_pos:
            per_patch = at_patches.sum(0, dtype=torch.float32)
            d_pos = torch.cat([first.unsqueeze(0), per_patch]).to(pos_dtype)
        if grad_patches:
            d_patches = at_patches
    return d_patches, d_cls, d_pos


def grid_side(num_patches: int) -> int:
    """Patches per side of a square grid of `num_patches`; ValueError if the grid is not square."""
    side = round(num_patches**0.5)
    if side * side != num_patches:
        raise ValueError(f"patches has {num_patches} patches per view, which is not a square grid.")
    return side


def block_scores(
    scores: Tensor,
    teacher_box: Tensor | None,
    view_boxes: Tensor | None,
    grid: int,
    block_size: int,
) -> Tensor:
    """(B, V, G/block_size, G/block_size) fp32: mean score of each block of each view."""
    scores = torch.nan_to_num(scores.float(), nan=0.0, posinf=SCORE_LIMIT, neginf=-SCORE_LIMIT)
    side = grid // block_size
    if teacher_box is None or view_boxes is None:
        batch, views = scores.shape[:2]
        return scores.view(batch, views, side, block_size, side, block_size).mean((3, 5))
    outer = teacher_box.unsqueeze(1)  # (B, 1, 4)
    size = scores.shape[-1]
    down = _remap(view_boxes[..., 0::2], outer[..., 0::2], size, grid, block_size)
    across = _remap(view_boxes[..., 1::2], outer[..., 1::2], size, grid, block_size)
    # Elementwise products, not matmul: the order of blocks must not depend on the TF32 setting.
    rows = (down.unsqueeze(-1) * scores.unsqueeze(2)).sum(-2)  # (B, V, side, S)
    return (rows.unsqueeze(-2) * across.unsqueeze(-3)).sum(-1)


def best_patches(blocks: Tensor, num_kept_blocks: int, block_size: int) -> Tensor:
    """(B, V, K) int64 ascending: patches of the best blocks of (B, V, side, side) block scores."""
    batch, views, side, _ = blocks.shape
    order = torch.sort(blocks.flatten(2), dim=-1, descending=True, stable=True).indices
    kept = order[..., :num_kept_blocks]
    corner = (kept // side * side * block_size + kept % side) * block_size
    offsets = torch.arange(block_size, device=blocks.device)
    inside = offsets.unsqueeze(1) * (side * block_size) + offsets
    ids = corner.unsqueeze(-1) + inside.flatten()
    return ids.flatten(2).sort(-1).values


def _remap(view: Tensor, outer: Tensor, size: int, grid: int, block_size: int) -> Tensor:
    """One axis of the resampling, as the matrix from the teacher's scores to a view's blocks.

    Args:
        view: (B, V, 2) int32, (start, length) of the view's box along this axis.
        outer: (B, 1, 2) int32, the same of the teacher's box.
        size: S, scores along this axis.

    Returns:
        (B, V, G/block_size, S) fp32. Bilinear (align_corners=False) up to the teacher crop's
        pixels, crop, bilinear down to the patch grid, mean over each block.
    """
    start, length = view[..., :1], view[..., 1:].clamp_min(1)  # (B, V, 1)
    outer_start, outer_length = outer[..., :1], outer[..., 1:].clamp_min(1)
    columns = torch.arange(size, device=view.device)
    patches = torch.arange(grid, device=view.device)
    matrix = torch.zeros(*view.shape[:2], grid, size, device=view.device)
    for pixel, pixel_share in _two_taps(patches, length, grid):
        pixel = pixel + (start - outer_start)
        inside = (pixel >= 0) & (pixel < outer_length)
        for column, share in _two_taps(pixel, size, outer_length):
            weight = pixel_share * share * inside
            matrix = matrix + (column.unsqueeze(-1) == columns) * weight.unsqueeze(-1)
    return matrix.unflatten(2, (grid // block_size, block_size)).mean(3)


def _two_taps(
    index: Tensor, source: Tensor | int, target: Tensor | int
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The two source positions and weights that F.interpolate reads for output `index`."""
    if isinstance(source, Tensor):
        scale = source.float() / target
        last = source - 1
    else:
        scale = source / target.float()
        last = torch.full_like(index, source - 1)
    position = ((index.float() + 0.5) * scale - 0.5).clamp_min(0)
    lower = position.floor()
    fraction = position - lower
    lower = lower.long()
    return (lower, 1 - fraction), (torch.minimum(lower + 1, last), fraction)
