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
from torch import Tensor

from aclip.kernels.cluster_counts import anchor_similarity, cluster_counts
from aclip.method.masks.keep_ratio import count_share
from aclip.method.masks.policy import MaskPolicy, Selection, ViewsToMask

FAR_OFF = 0.1
"""Clusters that hold this share of the patches more or less than are dropped ask for a warning."""


def select_cluster(views: ViewsToMask) -> Selection:
    """Keeps the blocks of the highest u - n: u is the noise, n in how many clusters a patch lies,
    mean over the block's patches."""
    if views.embeddings is None:
        pixels, anchors = views.pixels.flatten(0, 1), anchor_patches(views).flatten(0, 1)
        patch_size = pixels.shape[-1] // views.grid
        counts = cluster_counts(pixels, anchors, patch_size, views.cluster_threshold)
    else:
        counts = (similarity_to_anchors(views) > views.cluster_threshold).sum(1)
    counts = counts.view(*views.pixels.shape[:2], views.grid, views.grid)
    return views.by_patch(views.of_patches(views.noise) - counts)


def anchor_patches(views: ViewsToMask) -> Tensor:
    """The patches of the blocks of the lowest noise, ids (B, V, A) int64.

    Noise that decides between equals is thus lowest for the anchors, which go first of their
    clusters; among all other blocks it is as random as before.
    """
    b, grid = views.block_size, views.grid
    side = grid // b
    num_anchors = count_share(views.anchor_ratio, side * side)
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
    return of_pixels.lerp(chosen @ embeddings.mT, views.embeddings_share)


def inspect_cluster(views: ViewsToMask) -> tuple[dict[str, float], str]:
    """How well the threshold fits some views: see MaskPolicy.inspect.

    Returns:
        clustered, the share of the patches that lies in a cluster; and a sentence with the
        threshold at which as many would as are dropped, if it is far from that.
    """
    closest = similarity_to_anchors(views).amax(1)
    clustered = (closest > views.cluster_threshold).float().mean().item()
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
    keys=("anchor_ratio", "cluster_threshold", "cluster_embeddings"),
    inspect=inspect_cluster,
)
