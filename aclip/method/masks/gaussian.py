"""Patches near the middle of a view are kept more often: objects lie there.

Source: GLIP, arXiv:2403.15837.
"""

import torch

from aclip.method.masks.policy import MaskPolicy, Selection, ViewsToMask

VARIANCE = 0.2
"""The variance of the density over a view, whose sides reach from -1 to 1."""


def select_gaussian(views: ViewsToMask) -> Selection:
    """Keeps the blocks of the highest u - (1 - p): u is the noise, p the density at the block."""
    side = views.noise.shape[-1]
    place = torch.linspace(-1, 1, side, device=views.noise.device)
    squared_distance = place.square().unsqueeze(1) + place.square()
    density = torch.exp(-squared_distance / (2 * VARIANCE)) / (2 * torch.pi * VARIANCE)
    return views.by_block(views.noise - (1 - density))


GAUSSIAN = MaskPolicy(
    "gaussian",
    select_gaussian,
    "This run keeps the middle more often: shown is what attention would keep as well.",
    reads_noise=True,
)
