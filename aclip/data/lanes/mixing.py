"""Several weighted sources: which of them gives the samples of each lane in each step."""

from collections import Counter
from fractions import Fraction
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np

from aclip.data.lanes.order import SourceOrder, even_parts
from aclip.data.lanes.stream import LaneStream

PLASTIC = (0xC13FA9A902A6328F, 0x91E10DA5C79E7B1D)
"""2^64 / p and 2^64 / p^2 with p^3 = p + 1: multiples of both together fill a square evenly."""
MIXING = 5  # first word of a seed, after those of order.py
STEPS_AT_ONCE = 2**16


class Turns:
    """How many samples each lane takes from each source in a step, as a function of the step.

    A batch is a row of samples, the first source's first. The sources' shares of the row are as
    long as their weights say, so the borders between them fall between whole numbers. A step
    rounds its borders down or up, all at one threshold: up where a border's fraction is above it.
    The thresholds spread evenly over the steps, so that each border is rounded up as often as its
    fraction says. So every batch, and the whole run, hold each source by its weight to within a
    sample or two. The row goes to the lanes in turn, and which one comes first changes evenly too,
    so that a single lane holds the sources by their weights over time.

    A round of a source lasts as long as its samples suffice: it ends before the first step that
    would take more than the rounds so far have to give. What is left then begins the next round.
    So all lanes end a round in the same step. Where a step takes more than all of a source, each
    step is a round. To a source a round is what an epoch is to the only one.

    Args:
        weights: the sources' weights.
        num_samples: the sources' numbers of samples, in the same order.
        batch_size: samples of a step.
        num_lanes: number of lanes; divides `batch_size`.
        seed: the run's seed.
    """

    def __init__(
        self,
        weights: list[float],
        num_samples: list[int],
        batch_size: int,
        num_lanes: int,
        seed: int,
    ):
        self._num_samples = num_samples
        self._num_lanes = num_lanes
        shares = [Fraction(weight) for weight in weights]
        borders = [batch_size * end / sum(shares) for end in accumulate(shares, initial=Fraction())]
        # In whole numbers, so that every machine draws the same.
        self._whole = np.array([int(border) for border in borders])
        fractions = [int((border - int(border)) * 2**64) for border in borders]
        self._fraction = np.array(fractions, dtype=np.uint64)
        rng = np.random.default_rng([MIXING, seed])
        self._places = rng.permutation(num_lanes)
        self._starts = rng.integers(2**64 - 1, size=2, dtype=np.uint64, endpoint=True)
        self._last: tuple[int, np.ndarray] = (-1, np.array([]))
        self._known_steps = 0
        self._taken = np.zeros(len(weights), dtype=np.int64)  # in the known steps
        self._rounds: list[list[tuple[int, int]]] = [[] for _ in weights]

    def of_step(self, step: int) -> np.ndarray:
        """(sources, lanes) int64: how many samples each lane takes from each source."""
        if self._last[0] != step:  # all lanes ask for the same step
            self._last = step, self.of_steps(step, step + 1)
        return self._last[1]

    def of_steps(self, first: int, end: int) -> np.ndarray:
        """The same for the steps from `first` to `end`, without the latter, together."""
        lanes = self._num_lanes
        below = np.zeros((len(self._whole), lanes), dtype=np.int64)
        for start in range(first, end, STEPS_AT_ONCE):
            borders, turned = self._draw(start, min(start + STEPS_AT_ONCE, end))
            for border, of_border in zip(borders, below, strict=True):
                # Whole turns give each lane one; the rest of a turn goes to the lanes from
                # `turned` on, counted as what begins there less what ends.
                begins = np.bincount(turned, minlength=2 * lanes)
                ends = np.bincount(turned + border % lanes, minlength=2 * lanes)
                more = np.cumsum(begins - ends).reshape(2, lanes).sum(axis=0)
                of_border += (border // lanes).sum() + more
        return np.diff(below, axis=0)[:, self._places]

    def parts(self, source: int, number: int) -> np.ndarray:
        """How a round of a source is dealt, as order.even_parts."""
        (first, begin), (end, _) = self.round(source, number), self.round(source, number + 1)
        shares = self.of_steps(first, end)[source]
        return begin + np.concatenate([[0], np.cumsum(shares)])

    def round(self, source: int, number: int) -> tuple[int, int]:
        """A round's first step, and how many samples the source has given before."""
        while len(self._rounds[source]) <= number:
            self._find_rounds()
        return self._rounds[source][number]

    def describe_rest(self, source: int) -> str:
        """What the first round of a source leaves out, and where it comes in: for the log."""
        size, (steps, given) = self._num_samples[source], self.round(source, 1)
        if given > size:
            return f"{size:,} samples, which come {given / size:,.1f} times in a batch"
        rest = f"; the {size - given:,} left over begin the next pass" if given < size else ""
        return f"{size:,} samples come once in {steps:,} batches{rest}"

    def _find_rounds(self) -> None:
        """Looks for rounds that begin in further steps."""
        first = self._known_steps
        self._known_steps += min(max(first, 64), STEPS_AT_ONCE)
        borders, _ = self._draw(first, self._known_steps)
        taken = np.diff(borders, axis=0).cumsum(axis=1) + self._taken[:, None]
        before = np.concatenate([self._taken[:, None], taken], axis=1)
        self._taken = taken[:, -1]
        for rounds, size, counts in zip(self._rounds, self._num_samples, before, strict=True):
            # The ends of passes at or behind the first of these steps, and before the last one's.
            passes = np.arange(-(-int(counts[0]) // size), -(-int(counts[-1]) // size))
            steps = np.unique(np.searchsorted(counts, passes * size, side="right") - 1)
            rounds += zip((first + steps).tolist(), counts[steps].tolist(), strict=True)

    def _draw(self, first: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """(sources + 1, steps) borders, rounded, and (steps,) the place that comes first."""
        steps = np.arange(first, end, dtype=np.uint64)
        turned, threshold = (
            start + steps * np.uint64(factor)
            for start, factor in zip(self._starts, PLASTIC, strict=True)
        )
        borders = self._whole[:, None] + (threshold < self._fraction[:, None])
        turned = (turned >> np.uint64(32)) * np.uint64(self._num_lanes) >> np.uint64(32)
        return borders, turned.astype(np.int64)


class MixedLane:
    """One lane's samples from several sources, each step's as Turns says.

    The turns depend on the step alone; a bad sample is followed by the next one of its source.

    Args:
        streams: this lane's streams, one for each source.
        turns: the same for all lanes.
        lane: this lane's index.
        step: number of steps that the lane has given its samples for.

    Attributes:
        cursor: (step, then the cursor of each source's stream).
        skipped, repeated, warnings: all streams' together; see LaneStream.
    """

    def __init__(self, streams: list[LaneStream], turns: Turns, lane: int, step: int):
        self.streams = streams
        self.turns = turns
        self.lane = lane
        self.step = step

    @property
    def cursor(self) -> tuple[int, ...]:
        return (self.step, *(number for stream in self.streams for number in stream.cursor))

    @property
    def skipped(self) -> Counter[str]:
        return sum((stream.skipped for stream in self.streams), Counter())

    @property
    def repeated(self) -> int:
        return sum(stream.repeated for stream in self.streams)

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
        """The samples of the next step, source by source.

        Args:
            count: how many they are, a lane's share of the batch.

        Raises:
            ConfigError: what LaneStream.take raises.
        """
        counts = self.turns.of_step(self.step)[:, self.lane].tolist()
        assert sum(counts) == count
        self.step += 1
        taken = [stream.take(n) for stream, n in zip(self.streams, counts, strict=True)]
        return [sample for samples in taken for sample in samples]


def deal_sources(
    sizes: list[dict[int, int]],
    weights: list[float],
    batch_size: int,
    num_lanes: int,
    seed: int,
) -> tuple[list[SourceOrder], Turns | None]:
    """The orders of all sources, and whose turn it is; None where there is only one.

    Args:
        sizes: for each source the number of samples of its shards, by the shard's index.
        weights: the sources' weights; of an only source it is not read.
        batch_size, num_lanes, seed: as for Turns.
    """
    totals = [sum(of_source.values()) for of_source in sizes]
    if len(sizes) == 1:
        parts = partial(even_parts, totals[0], batch_size, num_lanes)
        return [SourceOrder(sizes[0], seed, parts)], None
    turns = Turns(weights, totals, batch_size, num_lanes, seed)
    orders = [
        SourceOrder(of_source, seed, partial(turns.parts, index), index)
        for index, of_source in enumerate(sizes)
    ]
    return orders, turns
