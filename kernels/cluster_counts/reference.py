"""cluster_counts in plain torch: the public meaning of the op, and its path on CPU."""

import torch
from torch import Tensor

VIEWS_AT_A_TIME = 64
"""Whose patches are in memory in fp32, several times over."""


def cluster_counts_reference(
    views: Tensor, anchors: Tensor, patch_size: int, threshold: float
) -> Tensor:
    """Counts the anchors whose cluster holds a patch, for every patch of every view.

    An anchor's cluster is every patch whose similarity with it is above the threshold.

    Args:
        views: (M, 3, R, R) float, normalised.
        anchors: (M, A) int64, ids of patches, in row-major order.
        patch_size: p, which divides R.
        threshold: what a similarity has to be above.

    Returns:
        (M, P) int32 with P = (R / p) ** 2.
    """
    similarity = anchor_similarity(views, anchors, patch_size)
    return (similarity > threshold).sum(1, dtype=torch.int32)


def anchor_similarity(views: Tensor, anchors: Tensor, patch_size: int) -> Tensor:
    """How similar the patches of a view are to its anchors: the cosine between their pixels, once
    each patch's 3 * p * p values have mean 0 and variance 1.

    Arguments are those of `cluster_counts_reference`; all arithmetic is fp32.

    Returns:
        (M, A, P) fp32 in [-1, 1] but for rounding. A patch whose values are all equal has no
        variance, and a similarity of 0 with every patch, itself included.

    Source: arXiv:2405.08815, section 3.
    """
    parts = zip(views.split(VIEWS_AT_A_TIME), anchors.split(VIEWS_AT_A_TIME), strict=True)
    return torch.cat([_similarity(*part, patch_size) for part in parts])


def _similarity(views: Tensor, anchors: Tensor, patch_size: int) -> Tensor:
    patches = views.float().unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size))
    patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (M, P, 3 * p * p)
    # Equal values are exactly 0 from here on, whatever the rounding of their mean would be.
    patches = patches - patches[..., :1]
    patches = patches - patches.mean(-1, keepdim=True)
    # A cosine takes the variance out as well.
    norms = patches.norm(dim=-1, keepdim=True)
    patches = patches / norms.clamp_min(torch.finfo(torch.float32).tiny)
    chosen = patches.gather(1, anchors.unsqueeze(2).expand(-1, -1, patches.shape[2]))
    return chosen @ patches.mT
