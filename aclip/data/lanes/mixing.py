"""Several weighted sources in one lane: which source gives the lane's next sample."""

from collections import Counter
from fractions import Fraction
from itertools import accumulate
from typing import Any

import numpy as np

from aclip.data.lanes.stream import LaneStream

CIRCLE = 2**64
PLASTIC = (0xC13FA9A902A6328F, 0x91E10DA5C79E7B1D)
"""2^64 / p and 2^64 / p^2 with p^3 = p + 1: multiples of both together fill a square evenly."""
MIXING = 5  # first word of a seed, after those of lane_order.py


class MixedLane:
    """One lane's samples from several sources, each usable sample from the source whose turn it is.

    Each source owns an arc of a circle, as long as its weight. At every turn the lanes stand on the
    circle at even distances, and a lane takes a sample of the source on whose arc it stands. So
    each global batch holds every source by its weight to within two samples. At every turn all
    lanes also move around the circle: by whole distances, and by a part of one. Both numbers follow
    a sequence that covers their range evenly, so a single lane and an epoch hold every source by
    its weight, too. The turns depend on the number of usable samples alone; a bad sample is
    followed by the next one of the same source.

    Args:
        streams: this lane's streams, one for each source.
        weights: the sources' weights, in the same order.
        lane: this lane's index.
        num_lanes: number of lanes.
        seed: the run's seed.
        taken: number of usable samples that this lane has given so far.

    Attributes:
        cursor: (taken, then epoch and position of each source's stream).
        skipped, warnings: all streams' together; see LaneStream.
    """

    def __init__(
        self,
        streams: list[LaneStream],
        weights: list[float],
        lane: int,
        num_lanes: int,
        seed: int,
        taken: int,
    ):
        self.streams = streams
        self.taken = taken
        shares = [Fraction(weight) for weight in weights]
        # In whole numbers, so that every machine draws the same.
        self._arcs = [CIRCLE * end // sum(shares) for end in accumulate(shares)]
        rng = np.random.default_rng([MIXING, seed])
        self._place = int(rng.permutation(num_lanes)[lane])
        self._num_lanes = num_lanes
        self._starts = [int(start) for start in rng.integers(CIRCLE - 1, size=2, dtype=np.uint64)]

    @property
    def cursor(self) -> tuple[int, ...]:
        return (self.taken, *(number for stream in self.streams for number in stream.cursor))

    @property
    def skipped(self) -> Counter[str]:
        return sum((stream.skipped for stream in self.streams), Counter())

    @property
    def warnings(self) -> list[str]:
        return [warning for stream in self.streams for warning in stream.warnings]

    def clear_reports(self) -> None:
        for stream in self.streams:
            stream.clear_reports()

    def prefetch(self) -> None:
        for stream in self.streams:
            stream.prefetch()

    def take(self, count: int) -> list[Any]:
        """The next `count` usable samples; raises what LaneStream.take raises."""
        samples = []
        for _ in range(count):
            samples += self.streams[self._turn()].take(1)
            self.taken += 1
        return samples

    def _turn(self) -> int:
        turned, shift = (
            (start + self.taken * step) % CIRCLE
            for start, step in zip(self._starts, PLASTIC, strict=True)
        )
        place = (self._place + turned * self._num_lanes // CIRCLE) % self._num_lanes
        angle = (place * CIRCLE + shift) // self._num_lanes
        return next(source for source, end in enumerate(self._arcs) if angle < end)
