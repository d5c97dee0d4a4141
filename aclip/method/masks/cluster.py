"""Patches that look like one another are dropped together: the clusters of random anchors.

Source: arXiv:2405.08815, which drops exactly the patches of the clusters, so that each view keeps
another number. Here each view keeps the same number, as batches without padding need it: first
patches of no cluster, then those of one, and so on; at random among equals. Where the clusters hold
as many patches as are dropped, both keep the same ones. Nobody has published results of this form.

Patches look alike by their pixels; the paper's option `mask.cluster_embeddings` lets the student's
patch embeddings take part more and more as the run goes on.

Dimensions: B samples, V views, M = B * V, G patches per side of a view, P = G * G, b patches per
side of a block, A anchors, C width of the student.
"""

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from aclip.kernels.cluster_counts import anchor_similarity, cluster_counts
from aclip.method.masks.keep_ratio import count_share
from aclip.method.masks.policy import MaskPolicy, Selection, ViewsToMask
from aclip.section import Section

FAR_OFF = 0.1
"""How far the share of clustered patches may be from the share that is dropped, before a warning
advises another threshold."""


class ClusterKeys(Section):
    """The policy's keys of the recipe's mask section."""

    anchor_ratio: float = Field(0.03, gt=0, le=1)
    """Share of the blocks, rounded up, whose patches are the anchors of a cluster mask."""
    cluster_threshold: float = Field(0.65, gt=-1, lt=1)
    """A patch is in an anchor's cluster where the cosine of their standardised pixels is above it.
    At 0.65 the clusters hold half of the patches of eight photographs in patches of 16 px; for
    other images the run's first evaluation says what would fit. The number kept does not depend on
    it."""
    cluster_embeddings: float = Field(0.0, ge=0, le=1)
    """How much the cosine of the student's patch embeddings counts at the end of the run, beside
    that of the pixels; from 0 at the start it rises with the progress."""


def select_cluster(views: ViewsToMask) -> Selection:
    """Keeps the blocks of the highest u - n: u is the noise, n in how many clusters a patch lies,
    mean over the block's patches."""
    if views.embeddings is None:
        pixels, anchors = views.pixels.flatten(0, 1), anchor_patches(views).flatten(0, 1)
        patch_size = pixels.shape[-1] // views.grid
        counts = cluster_counts(pixels, anchors, patch_size, views.keys.cluster_threshold)
    else:
        counts = (similarity_to_anchors(views) > views.keys.cluster_threshold).sum(1)
    counts = counts.view(*views.pixels.shape[:2], views.grid, views.grid)
    return views.by_patch(views.of_patches(views.noise) - counts)


def anchor_patches(views: ViewsToMask) -> Tensor:
    """The patches of the blocks of the lowest noise, ids (B, V, A) int64.

    Noise that decides between equals is thus lowest for the anchors, which go first of their
    clusters; among all other blocks it is as random as before.
    """
    b, grid = views.block_size, views.grid
    side = grid // b
    num_anchors = count_share(views.keys.anchor_ratio, side * side)
    blocks = views.noise.flatten(2).argsort(dim=-1, stable=True)[..., :num_anchors]
    first = blocks // side * b * grid + blocks % side * b
    inside = torch.arange(b, device=first.device)
    within = (inside.unsqueeze(1) * grid + inside).flatten()
    return (first.unsqueeze(-1) + within).flatten(2)


def similarity_to_anchors(views: ViewsToMask) -> Tensor:
    """(M, A, P) fp32: the cosine of standardised pixels, mixed with that of patch embeddings.

    Source: arXiv:2405.08815, which gives the embeddings a weight of epoch / 32 in 32 epochs.
    """
    pixels, anchors = views.pixels.flatten(0, 1), anchor_patches(views).flatten(0, 1)
    of_pixels = anchor_similarity(pixels, anchors, pixels.shape[-1] // views.grid)
    if views.embeddings is None:
        return of_pixels
    embeddings = F.normalize(views.embeddings.flatten(0, 1).float(), dim=-1)
    chosen = embeddings.gather(1, anchors.unsqueeze(2).expand(-1, -1, embeddings.shape[2]))
    share = views.progress * views.keys.cluster_embeddings
    return of_pixels.lerp(chosen @ embeddings.mT, share)


def inspect_cluster(views: ViewsToMask) -> tuple[dict[str, float], str]:
    """How well the threshold fits some views: see MaskPolicy.inspect.

    Returns:
        clustered, the share of the patches that lie in a cluster; and, where that is far from the
        share that the mask drops, a sentence with the threshold at which the two would be equal.
    """
    closest = similarity_to_anchors(views).amax(1)
    clustered = (closest > views.keys.cluster_threshold).float().mean().item()
    kept = views.num_kept_blocks / (views.grid // views.block_size) ** 2
    warning = ""
    if kept < 1 and abs(clustered - (1 - kept)) > FAR_OFF:
        fitting = closest.flatten().quantile(kept).item()
        warning = (
            f"clusters hold {100 * clustered:.0f} % of the patches, where the mask drops "
            f"{100 * (1 - kept):.0f} %, and noise decides on the rest; in a new run, "
            f"mask.cluster_threshold={fitting:.2f} would fit these images"
        )
    return {"clustered": clustered}, warning


CLUSTER = MaskPolicy(
    "cluster",
    select_cluster,
    "This run drops clusters of patches that look alike: shown is what attention would keep as "
    "well.",
    reads_noise=True,
    reads_pixels=True,
    keys=ClusterKeys,
    inspect=inspect_cluster,
)
