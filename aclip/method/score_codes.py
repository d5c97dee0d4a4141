"""The teacher's scores as one byte a patch: what is kept of them from epoch to epoch.

The code is logarithmic, since a mask asks which of two scores is larger, and by how much.
"""

import torch
from torch import Tensor

CODES_PER_E = 24
"""Codes in which a score grows by the factor e, so that a step between two is 4.3 %."""
HIGHEST = 255
"""The code of an image's highest score. The lowest code is 1; 0 stands for no score."""


def encode_scores(scores: Tensor) -> Tensor:
    """The code round(255 + 24 ln(score / highest of the image)), not below 1.

    Args:
        scores: (B, S, S) float, not negative; NaN counts as 0.

    Returns:
        (B, S, S) uint8 in 1 to 255.
    """
    scores = scores.float().nan_to_num(nan=0.0)
    highest = scores.amax((1, 2), keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    codes = HIGHEST + CODES_PER_E * (scores / highest).log()
    return codes.round().clamp(1, HIGHEST).to(torch.uint8)


def decode_scores(codes: Tensor) -> Tensor:
    """The scores of codes in 1 to 255, as shares of the image's highest one.

    A share of at least exp(-254 / 24) = 2.5e-5 comes back within 2.1 %, the half of a step; a lower
    one becomes that.

    Args:
        codes: (B, S, S) uint8.

    Returns:
        (B, S, S) fp32 in (0, 1].
    """
    return ((codes.float() - HIGHEST) / CODES_PER_E).exp()
