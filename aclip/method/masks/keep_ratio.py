"""How many blocks a view keeps, as a function of how much of the run is done."""

import math
from typing import Literal

KeepRatioShape = Literal["linear", "cosine"]


def keep_ratio(progress: float, start: float, end: float | None, shape: KeepRatioShape) -> float:
    """The share of blocks that is kept: `start` before the first sample, `end` after the last.

    Args:
        progress: how much of the run is done, in [0, 1].
        start, end, shape: the recipe's mask.keep_ratio, keep_ratio_end and keep_ratio_shape.
    """
    if end is None:
        return start
    done = progress if shape == "linear" else 0.5 * (1 - math.cos(math.pi * progress))
    return start + (end - start) * done


def count_share(share: float, number: int) -> int:
    """A share of a number, rounded up: count_share(0.5, 49) is 25."""
    # 0.28 * 25 is 7.000000000000001 in floats, and that is not eight.
    return math.ceil(share * number - 1e-9)
