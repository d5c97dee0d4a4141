"""Which samples a lane takes in each epoch, and in what order: from sizes and seeds alone.

The order of a data set is made of virtual lanes, so that it is the same for any ranks x workers
that divide them. An epoch deals a seeded permutation of a source's shards to the lanes. A lane
reads its shards one after the other and shuffles blocks of consecutive samples. With fewer shards
than lanes, every lane goes through all shards and takes each num_lanes-th sample.
"""

from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

# First word of each seed, so that two uses of the same numbers draw different streams.
SHARD_ORDER, BLOCK_ORDER, SAMPLE, SOURCE = 1, 2, 3, 4


def sample_rng(
    seed: int, lane: int, epoch: int, position: int, source: int = 0
) -> np.random.Generator:
    """The generator of everything random about one sample."""
    return _rng(source, SAMPLE, seed, lane, epoch, position)


def _rng(source: int, *words: int) -> np.random.Generator:
    # The first source draws what a data set without sources does.
    return np.random.default_rng([SOURCE, source, *words] if source else list(words))


@dataclass(frozen=True, slots=True)
class Span:
    """What a lane takes of one shard."""

    shard: int
    """The shard's index in the data set."""
    samples: range
    """Positions in the shard, ascending; empty where the lane takes none of them."""


class LaneEpoch:
    """The samples of one lane in one epoch.

    Args:
        spans: in the order in which they are read.
        shuffle_block: number of consecutive samples that are shuffled together.
        block_seed: seed of a block's shuffle, without its last word, which is the block's number.
        counts_unlisted: whether this lane counts the samples that its shards hold beyond their
            index; of the lanes that share a shard only one does.

    Attributes:
        num_samples: number of samples in all spans. Positions in the lane's order are below it.
    """

    def __init__(
        self,
        spans: list[Span],
        shuffle_block: int,
        block_seed: tuple[int, ...],
        counts_unlisted: bool,
    ):
        self.spans = spans
        self.counts_unlisted = counts_unlisted
        self._shuffle_block = shuffle_block
        self._block_seed = block_seed
        self._ends = list(accumulate(len(span.samples) for span in spans))
        self.num_samples = self._ends[-1]

    def block(self, position: int) -> range:
        """The positions that are shuffled together with `position`."""
        first = position // self._shuffle_block * self._shuffle_block
        return range(first, min(first + self._shuffle_block, self.num_samples))

    def shuffled(self, block: range) -> np.ndarray:
        """(len(block),) int64: which of the block's samples, as read, comes at each position."""
        number = block.start // self._shuffle_block
        return _rng(*self._block_seed, number).permutation(len(block))

    def spans_from(self, num_read: int) -> list[Span]:
        """The spans that are left after the first `num_read` samples; the first one is cut."""
        number = bisect_right(self._ends, num_read)
        if number == len(self.spans):
            return []
        span = self.spans[number]
        left = span.samples[num_read - self._ends[number] :]  # counted from the span's end
        return [Span(span.shard, left), *self.spans[number + 1 :]]

    def sample_at(self, position: int) -> tuple[int, int]:
        """The sample that comes at `position`: its shard's index and its position in the shard."""
        block = self.block(position)
        num_read = block.start + int(self.shuffled(block)[position - block.start])
        span = self.spans_from(num_read)[0]
        return span.shard, span.samples.start


class LaneOrder:
    """The order of one lane's samples from one source.

    Args:
        sizes: the number of samples of each of the source's shards, by the shard's index.
        lane: this lane's index.
        num_lanes: number of lanes that the source is dealt to.
        seed: the run's seed.
        shuffle_block: number of consecutive samples that are shuffled together.
        source: the source's index.

    Attributes:
        shares_shards: whether all lanes read all shards, because there are too few for each to have
            its own.
    """

    def __init__(
        self,
        sizes: dict[int, int],
        lane: int,
        num_lanes: int,
        seed: int,
        shuffle_block: int,
        source: int = 0,
    ):
        self.lane = lane
        self.num_lanes = num_lanes
        self.seed = seed
        self.shuffle_block = shuffle_block
        self.source = source
        self.shares_shards = len(sizes) < num_lanes
        self._sizes = sizes
        self._shards = list(sizes)

    def epoch(self, epoch: int) -> LaneEpoch:
        """This lane's part of an epoch; any epoch may be asked for at any time."""
        rng = _rng(self.source, SHARD_ORDER, self.seed, epoch)
        order = rng.permutation(len(self._shards))
        first, step = 0, 1
        if self.shares_shards:
            # Another part of the samples for each lane in each epoch.
            first = int(self.lane + rng.integers(self.num_lanes)) % self.num_lanes
            step = self.num_lanes
        else:
            order = order[self.lane :: self.num_lanes]
        counts_unlisted = first == 0
        spans = []
        for shard in (self._shards[place] for place in order):
            samples = range(first, self._sizes[shard], step)
            spans.append(Span(shard, samples))
            # The next shard goes on where the turns of the lanes ended in this one.
            first = (first - self._sizes[shard]) % step
        return LaneEpoch(
            spans,
            self.shuffle_block,
            (self.source, BLOCK_ORDER, self.seed, epoch, self.lane),
            counts_unlisted,
        )
