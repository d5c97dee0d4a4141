"""Which row reaches most with how much: the rows' points in the plane of FLOPs and accuracy."""

from collections.abc import Iterable
from dataclasses import dataclass

SAME = 0.02
"""FLOPs that differ by a smaller share count as equal: quarters of runs end with whole steps."""


@dataclass(frozen=True)
class Point:
    """What the runs of a row have reached so far: their FLOPs, and the mean of their accuracies."""

    row: str
    flops: float
    accuracy: float


def frontier(points: Iterable[Point]) -> list[Point]:
    """The points that no other one beats, by their FLOPs: none has as much accuracy with fewer
    FLOPs, or more accuracy with as many. Equal points are all among them."""
    ordered = sorted(points, key=lambda each: (each.flops, -each.accuracy))
    return [point for point in ordered if not any(_beats(other, point) for other in ordered)]


def _beats(other: Point, point: Point) -> bool:
    if other.accuracy == point.accuracy:
        return (1 + SAME) * other.flops < point.flops
    return other.accuracy > point.accuracy and other.flops <= (1 + SAME) * point.flops
