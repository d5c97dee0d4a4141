"""Which row reaches most with how much: the rows' points in the plane of FLOPs and accuracy."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Point:
    """What the runs of a row have reached so far: their FLOPs, and the mean of their accuracies."""

    row: str
    flops: float
    accuracy: float


def frontier(points: Iterable[Point]) -> list[Point]:
    """The points that no other one beats, by their FLOPs: none has as much accuracy with fewer
    FLOPs, or more accuracy with as many. Equal points are all among them."""
    best = float("-inf")
    chosen: list[Point] = []
    for point in sorted(points, key=lambda each: (each.flops, -each.accuracy)):
        is_equal = bool(chosen) and (point.flops, point.accuracy) == (chosen[-1].flops, best)
        if point.accuracy > best or is_equal:
            chosen.append(point)
            best = point.accuracy
    return chosen
