"""Noise beside the teacher's scores: while a mask warms up, and where kept blocks are drawn.

Dimensions: B samples, V views, g blocks per side of a view.
"""

import torch
from torch import Tensor

LEAST_NOISE = 2.0**-25
"""Stands for 0, whose Gumbel noise would be infinite: half of the smallest other number drawn."""


def noise_share(progress: float, warmup: float, change: str) -> float:
    """How much noise decides in place of scores, from 1 (alone) to 0 (not at all).

    Args:
        progress: how much of the run is done, in [0, 1].
        warmup, change: the recipe's mask.warmup and mask.warmup_change.
    """
    if progress >= warmup:
        return 0.0
    return 1 - progress / warmup if change == "gradual" else 1.0


def mix_with_noise(scores: Tensor, noise: Tensor, share: float) -> Tensor:
    """(1 - share) * rank + share * noise, with the rank of a block's score in its view, scaled to
    [0, 1): ranks lie evenly in the noise's range, however peaked the scores are.

    Args:
        scores: (B, V, g, g) float. Of equal ones the first ranks highest, as it is kept first.
        noise: (B, V, g, g) uniform in [0, 1).
        share: the noise's, in [0, 1].
    """
    flat = scores.flatten(2)
    better = flat.sort(dim=-1, descending=True, stable=True).indices.argsort(-1)
    ranks = (flat.shape[-1] - 1 - better) / flat.shape[-1]
    return ranks.view_as(scores).lerp(noise, share)


def draw_by_score(scores: Tensor, noise: Tensor, temperature: float, lowest: bool) -> Tensor:
    """Numbers whose k highest are k blocks drawn without replacement, one after the other, each
    with odds of score ** (1 / temperature) among those left.

    Args:
        scores: (B, V, g, g) float; one that is not above 0 counts as the smallest that is.
        noise: (B, V, g, g) uniform in [0, 1).
        temperature: above 0.
        lowest: whether the odds are score ** (-1 / temperature).

    Source: the Gumbel top-k trick, arXiv:1903.06059; here times the temperature, which changes no
        order and can't overflow.
    """
    log = scores.clamp_min(torch.finfo(scores.dtype).tiny).log()
    gumbel = -noise.clamp_min(LEAST_NOISE).log().neg().log()
    return (-log if lowest else log) + temperature * gumbel
