"""Which patches a student view keeps, as the scores and boxes that the `attentive_pack` op reads,
and which patches and words masked modelling hides."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from aclip.kernels.attentive_pack import attentive_pack


@dataclass(frozen=True)
class Selection:
    """Scores per view source and how many blocks of them are kept.

    Attributes:
        scores: with boxes (B, 1, S, S), the teacher's scores of its own view; without (B, V, G, G),
            scores that lie on each student view's grid already. Float, no gradient.
        teacher_box: (B, 4) int32, pixels of the source image, or None.
        view_boxes: (B, V, 4) int32, same convention, or None.
        num_kept_blocks: of the (G / block_size)^2 blocks of a view.
        block_size: patches per side of a block.
    """

    scores: Tensor
    teacher_box: Tensor | None
    view_boxes: Tensor | None
    num_kept_blocks: int
    block_size: int

    @property
    def num_kept_patches(self) -> int:
        return self.num_kept_blocks * self.block_size**2


def select(
    policy: str,
    num_kept_blocks: int,
    block_size: int,
    *,
    teacher_scores: Tensor | None = None,
    teacher_box: Tensor | None = None,
    view_boxes: Tensor | None = None,
    noise: Tensor | None = None,
) -> Selection | None:
    """Builds the selection of a mask policy.

    Args:
        policy: none, random, attentive or inverse.
        num_kept_blocks, block_size: see Selection.
        teacher_scores: (B, S, S) float, for attentive and inverse.
        teacher_box, view_boxes: see Selection, for attentive and inverse.
        noise: (B, V, G / block_size, G / block_size) uniform, for random.

    Returns:
        The selection, or None when every patch is kept.
    """
    if policy == "none":
        return None
    if policy == "random":
        # The op takes scores per patch; the mean over a block of equal ones is the block's.
        scores = noise.repeat_interleave(block_size, 2).repeat_interleave(block_size, 3)
        return Selection(scores, None, None, num_kept_blocks, block_size)
    scores = teacher_scores.detach().unsqueeze(1)
    if policy == "inverse":
        scores = -scores
    return Selection(scores, teacher_box, view_boxes, num_kept_blocks, block_size)


def kept_patches(selection: Selection, grid: int, num_samples: int, num_views: int) -> Tensor:
    """The ids that the student's op keeps, without a tower; for pictures and measurements.

    Returns:
        (B, V, K) int64, ascending.
    """
    rows, patches = num_samples * num_views, grid * grid
    blank = selection.scores.new_zeros(rows, patches, 1)
    _, keep_ids = attentive_pack(
        blank,
        blank.new_zeros(1),
        blank.new_zeros(1 + patches, 1),
        selection.scores,
        selection.teacher_box,
        selection.view_boxes,
        selection.num_kept_blocks,
        selection.block_size,
    )
    return keep_ids


def other_patches(keep_ids: Tensor, num_patches: int) -> Tensor:
    """The patches that are not kept: (B, K) int64 -> (B, num_patches - K) int64, ascending."""
    kept = keep_ids.new_zeros(len(keep_ids), num_patches, dtype=torch.int8).scatter(1, keep_ids, 1)
    return kept.argsort(dim=1, stable=True)[:, : num_patches - keep_ids.shape[1]]


def mask_tokens(tokens: Tensor, noise: Tensor, mask_ratio: float) -> Tensor:
    """Chooses the tokens that masked language modelling hides: those of the lowest noise.

    Args:
        tokens: (B, L) int64, start token first, end token last, zeros behind it.
        noise: (B, at least L - 2) uniform; number i belongs to the caption's word piece i.
        mask_ratio: share of a caption's n word pieces, rounded, one or more where there are any.

    Returns:
        (B, L) bool, false at start, end and padding.
    """
    num_pieces = tokens.argmax(1, keepdim=True) - 1  # (B, 1)
    num_masked = (num_pieces * mask_ratio).round().clamp(min=1).minimum(num_pieces)
    pieces = torch.arange(tokens.shape[1] - 2, device=tokens.device)
    noise = noise[:, : len(pieces)].masked_fill(pieces >= num_pieces, 2.0)  # above any noise
    ranks = noise.argsort(dim=1, stable=True).argsort(dim=1)
    return F.pad(ranks < num_masked, (1, 1))
