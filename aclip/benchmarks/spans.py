"""Time that a profile's events cover together."""

from collections.abc import Iterable


def covered(spans: Iterable[tuple[int, int]]) -> int:
    """How much of the time lies in at least one of the (begin, end), in their unit."""
    total, reached = 0, None
    for begin, end in sorted(spans):
        reached = begin if reached is None else max(reached, begin)
        total += max(0, end - reached)
        reached = max(reached, end)
    return total
