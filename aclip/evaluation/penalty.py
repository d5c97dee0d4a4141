"""Which penalty a linear probe takes: the best of 97, found in at most 15 tries."""

from collections.abc import Callable
from typing import Any

STEPS_PER_DECADE = 8
LOWEST, HIGHEST = -6, 6
"""Exponents of ten of the penalty."""
MOST_FITS = 16
"""`choose_penalty` asks for 15 at most, and the last one sees the held-out samples too."""


def choose_penalty(score: Callable[[float], Any]) -> float:
    """The penalty with the best score.

    Every second decade is tried first, then penalties ever closer to the best one. Among equal
    scores the largest penalty wins.

    Args:
        score: gives a penalty's score, of any type that can be compared, higher is better. It is
            called at most once for each penalty.
    """
    last = (HIGHEST - LOWEST) * STEPS_PER_DECADE
    scores: dict[int, Any] = {}

    def try_steps(steps: list[int]) -> int:
        for step in sorted(steps, reverse=True):
            if 0 <= step <= last and step not in scores:
                scores[step] = score(_penalty(step))
        return max(scores, key=lambda step: (scores[step], step))

    width = 2 * STEPS_PER_DECADE
    best = try_steps(list(range(0, last + 1, width)))
    while width > 1:
        width //= 2
        best = try_steps([best - width, best + width])
    return _penalty(best)


def _penalty(step: int) -> float:
    return 10 ** (LOWEST + step / STEPS_PER_DECADE)
