"""Which samples a lane takes in each epoch, and in what order: from sizes and seeds alone.

A source's samples form one endless sequence: a seeded permutation of its shards, end to end, then
the next one. An epoch is a stretch of that sequence, cut into consecutive parts, one for each lane,
wherever shards begin and end. So the order is the same for any ranks x workers that divide the
lanes, and all lanes end an epoch in the same step. A lane shuffles blocks of consecutive samples.
"""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

# First word of each seed, so that two uses of the same numbers draw different streams.
SHARD_ORDER, BLOCK_ORDER, SAMPLE, SOURCE = 1, 2, 3, 4
PASSES_KEPT = 4
"""Passes whose order a SourceOrder keeps: an epoch lies in two, and the next one begins."""


def sample_rng(
    seed: int, lane: int, epoch: int, position: int, source: int = 0
) -> np.random.Generator:
    """The generator of everything random about one sample."""
    return _rng(source, SAMPLE, seed, lane, epoch, position)


def _rng(source: int, *words: int) -> np.random.Generator:
    # The first source draws what a data set without sources does.
    return np.random.default_rng([SOURCE, source, *words] if source else list(words))


def even_parts(num_samples: int, batch_size: int, num_lanes: int, epoch: int) -> np.ndarray:
    """How an epoch of the only source is dealt: as many whole batches as its end allows.

    The samples that fill no batch begin the next epoch, so that none is left out.

    Returns:
        (num_lanes + 1,) int64: the places in the source's sequence at which the lanes' parts begin,
        and the end of the last part. `num_lanes` divides `batch_size`.
    """
    first, end = (number * num_samples // batch_size for number in (epoch, epoch + 1))
    share = batch_size // num_lanes
    return first * batch_size + np.arange(num_lanes + 1) * (end - first) * share


def describe_rest(num_samples: int, batch_size: int) -> str:
    """What an epoch leaves out, and where it comes in: a sentence for the log."""
    steps, rest = divmod(num_samples, batch_size)
    if steps == 0:
        samples = "1 sample is" if num_samples == 1 else f"{num_samples:,} samples are"
        return (
            f"{samples} less than a batch of {batch_size:,}, in which each comes "
            f"{batch_size / num_samples:,.1f} times on average"
        )
    left = f"; the {rest:,} left over begin the next epoch" if rest else ""
    return f"an epoch of {num_samples:,} samples is {steps:,} batches of {batch_size:,}{left}"


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive samples of one shard."""

    shard: int
    """The shard's index in the data set."""
    samples: range
    """Positions in the shard, ascending; at least one."""
    number: int = 0
    """Which pass through the source they belong to."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a sample stands in the data set, and in the order of its lane."""

    shard: int
    """The shard's index in the data set."""
    index: int
    """The sample's position in the shard."""
    epoch: int
    position: int
    """As in a cursor."""
    is_first: bool = True
    """Whether it comes in its own pass. Every sample comes so at most once an epoch; what another
    pass has left over, or what stands in for a bad sample, may come beside that."""


class SourceOrder:
    """The endless sequence of one source's samples; a place in it is a number from 0.

    Args:
        sizes: the number of samples of each of the source's shards, by the shard's index.
        seed: the run's seed.
        parts: gives the lanes' parts of an epoch, as even_parts does.
        source: the source's index.

    Attributes:
        sizes: as given.
        num_samples: in all shards. Pass p holds the places from p * num_samples on.
    """

    def __init__(
        self,
        sizes: dict[int, int],
        seed: int,
        parts: Callable[[int], np.ndarray],
        source: int = 0,
    ):
        self.seed = seed
        self.source = source
        self.num_samples = sum(sizes.values())
        self._parts = parts
        self.sizes = sizes
        self._shards = list(sizes)
        self._passes: dict[int, tuple[list[int], list[int]]] = {}
        self._dealt: dict[int, list[int]] = {}

    def parts(self, epoch: int) -> list[int]:
        """The places at which the lanes' parts of an epoch begin, and the end of the last one."""
        if epoch not in self._dealt:
            _forget(self._dealt)
            self._dealt[epoch] = self._parts(epoch).tolist()
        return self._dealt[epoch]

    def spans(self, first: int, end: int) -> list[Span]:
        """The samples at the places from `first` to `end`, without the latter."""
        spans = []
        while first < end:
            number, place = divmod(first, self.num_samples)
            shards, ends = self._pass(number)
            index = bisect_right(ends, place)
            start = self.sizes[shards[index]] - (ends[index] - place)
            count = min(ends[index] - place, end - first)
            spans.append(Span(shards[index], range(start, start + count), number))
            first += count
        return spans

    def _pass(self, number: int) -> tuple[list[int], list[int]]:
        """The shards in the order of a pass, and the places in it at which they end."""
        if number not in self._passes:
            _forget(self._passes)
            rng = _rng(self.source, SHARD_ORDER, self.seed, number)
            shards = [self._shards[index] for index in rng.permutation(len(self._shards))]
            self._passes[number] = shards, list(accumulate(self.sizes[s] for s in shards))
        return self._passes[number]


def _forget(kept: dict) -> None:
    """Makes room for another entry."""
    if len(kept) >= PASSES_KEPT:
        del kept[next(iter(kept))]


class LaneEpoch:
    """The samples of one lane in one epoch: first its part, then what it reads on for.

    A position is a sample's number in the lane's order of the epoch. Positions from `num_samples`
    on stand for the places behind the part, then for those before it, and at last for what comes
    behind the epoch, without end. A lane reads them in place of samples that can't be used.

    Attributes:
        num_samples: number of samples in the lane's part, and of usable ones that it gives.
    """

    def __init__(self, source: SourceOrder, lane: int, epoch: int, shuffle_block: int):
        parts = source.parts(epoch)
        first, end = parts[lane : lane + 2]
        self.num_samples = end - first
        self._source = source
        self._shuffle_block = shuffle_block
        self._block_seed = (source.source, BLOCK_ORDER, source.seed, epoch, lane)
        self._spans = source.spans(first, end)
        if lane % 2:
            # Two neighbours share the shard between them. So both read it at the same time, at the
            # beginning of the epoch or at the end, and a remote one is fetched once for both.
            self._spans.reverse()
        self._ends = list(accumulate(len(span.samples) for span in self._spans))
        self._further = ((end, parts[-1]), (parts[0], first))
        self._behind = parts[-1]

    def block(self, position: int) -> range:
        """The positions that are shuffled together with `position`."""
        is_own = position < self.num_samples
        start, size = 0 if is_own else self.num_samples, self._shuffle_block
        first = start + (position - start) // size * size
        return range(first, min(first + size, self.num_samples) if is_own else first + size)

    def shuffled(self, block: range) -> np.ndarray:
        """(len(block),) int64: which of the block's samples, as read, comes at each position."""
        # The first block behind the part gets the number behind its last one.
        number = -(-block.start // self._shuffle_block)
        return _rng(*self._block_seed, number).permutation(len(block))

    def spans(self, positions: range) -> list[Span]:
        """The samples at consecutive positions as they are read, before the shuffle."""
        first, end = positions.start, positions.stop
        spans = []
        index = bisect_right(self._ends, first)
        while first < min(end, self.num_samples):
            span = self._spans[index]
            start = len(span.samples) - (self._ends[index] - first)
            samples = span.samples[start : start + end - first]
            spans.append(Span(span.shard, samples, span.number))
            first += len(samples)
            index += 1
        first, end = first - self.num_samples, end - self.num_samples
        for begin, stop in self._further:
            if first < end and first < stop - begin:
                spans += self._source.spans(begin + first, min(begin + end, stop))
            first, end = max(0, first - (stop - begin)), end - (stop - begin)
        if first < end:
            spans += self._source.spans(self._behind + first, self._behind + end)
        return spans

    def end_of_span(self, position: int) -> int:
        """The position in the part at which the shard of `position` has been read, or its end."""
        if position >= self.num_samples:
            return self.num_samples
        return self._ends[bisect_right(self._ends, position)]

    def sample_at(self, position: int) -> tuple[int, int]:
        """The sample that comes at `position`: its shard's index and its position in the shard."""
        block = self.block(position)
        place = block.start + int(self.shuffled(block)[position - block.start])
        (span,) = self.spans(range(place, place + 1))
        return span.shard, span.samples.start


class LaneOrder:
    """The order of one lane's samples from one source.

    Args:
        source: the source's sequence; lanes may share the object.
        lane: this lane's index.
        shuffle_block: number of consecutive samples that are shuffled together.
    """

    def __init__(self, source: SourceOrder, lane: int, shuffle_block: int):
        self.source = source
        self.lane = lane
        self.shuffle_block = shuffle_block

    def epoch(self, epoch: int) -> LaneEpoch:
        """This lane's part of an epoch; any epoch may be asked for at any time."""
        return LaneEpoch(self.source, self.lane, epoch, self.shuffle_block)
