"""The order of samples: V virtual lanes, the same order for any ranks x workers that divides V.

An epoch deals a seeded permutation of the shards to the lanes; a lane reads its shards in order and
shuffles blocks of consecutive samples. With fewer shards than lanes, every lane reads all shards
and takes each num_lanes-th sample. A cursor (epoch, position) says which sample comes next; it
counts every sample of the lane's epoch, usable or not, so a bad one never shifts the others.
"""

import logging
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any

import numpy as np

from aclip.data.shards.listing import Shard, Skip, read_shard
from aclip.data.shards.tar import RawSample, ShardError
from aclip.errors import ConfigError

logger = logging.getLogger(__name__)

MAX_WORKERS = 8
MAX_UNREADABLE = 8
"""Shards in a row that a lane may find unreadable before the run ends, where they are skipped."""
MAX_UNUSABLE = 1000
"""Samples in a row that a lane may find unusable before the run ends, where lanes share shards."""

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


def resolve_lanes(lanes: int | None, num_shards: int, global_batch_size: int) -> int:
    """The number of lanes: as given, or the largest divisor of the batch that shards suffice for.

    It never depends on the number of ranks, so that a run keeps its order on another number.

    Raises:
        ConfigError: `lanes` does not divide the batch.
    """
    if lanes is None:
        most = min(num_shards, global_batch_size)
        return next(count for count in range(most, 0, -1) if global_batch_size % count == 0)
    if global_batch_size % lanes:
        raise ConfigError(
            f"data.lanes is {lanes}, which does not divide train.global_batch_size "
            f"{global_batch_size}; set data.lanes to a divisor, or leave it empty"
        )
    return lanes


def cost_of_striding(num_shards: int, num_lanes: int, name: str) -> str:
    """The warning about a data set whose shards are fewer than the lanes."""
    return (
        f"{name} has {num_shards} shards for {num_lanes} data lanes: every lane reads through all "
        f"of them and takes each {num_lanes}th sample, so each shard is opened and walked "
        f"{num_lanes} times an epoch instead of once; split the data into {num_lanes} shards or "
        "more, or set data.lanes lower"
    )


def resolve_workers(workers: int | None, lanes: int, world_size: int, cores_per_rank: int) -> int:
    """Worker processes of a rank: as given, or the largest number that cores and lanes allow.

    Raises:
        ConfigError: ranks x workers does not divide the lanes; 0 workers count as 1.
    """
    if lanes % world_size:
        raise ConfigError(
            f"{world_size} ranks do not divide the {lanes} data lanes; run on "
            f"{_nearest_divisors(lanes, world_size)} ranks, or set data.lanes to a multiple of the "
            "ranks that divides train.global_batch_size"
        )
    per_rank = lanes // world_size
    if workers is None:
        most = max(1, min(MAX_WORKERS, cores_per_rank, per_rank))
        return next(count for count in range(most, 0, -1) if per_rank % count == 0)
    if per_rank % max(1, workers):
        raise ConfigError(
            f"data.workers is {workers}, which does not divide the {per_rank} data lanes of each "
            f"of the {world_size} ranks; set data.workers to "
            f"{_nearest_divisors(per_rank, workers)}, or leave it empty"
        )
    return workers


class LaneStream:
    """Endless stream of one lane's usable samples, from one source.

    Args:
        shards: of all sources, in the recipe's order.
        lane: index of this lane.
        num_lanes: of all.
        seed: of the run.
        shuffle_block: samples shuffled together.
        cursor: (epoch, position) of the sample to start with.
        prepare: called as prepare(shard_index, raw, epoch, position); gives the sample, or Skip.
        source: whose shards are read.
        skips_unreadable: the samples of a shard that can't be read are skipped; else it raises.

    Attributes:
        epoch, position: the cursor of the next sample.
        skipped: counts of skipped samples by kind, for the owner to take.
        warnings: sentences about shards with nothing usable, likewise.
    """

    def __init__(
        self,
        shards: list[Shard],
        lane: int,
        num_lanes: int,
        seed: int,
        shuffle_block: int,
        cursor: tuple[int, int],
        prepare: Callable[[int, RawSample, int, int], Any],
        source: int = 0,
        skips_unreadable: bool = False,
    ):
        self.shards = shards
        self.lane = lane
        self.num_lanes = num_lanes
        self.seed = seed
        self.shuffle_block = shuffle_block
        self.prepare = prepare
        self.source = source
        self.skips_unreadable = skips_unreadable
        self.skipped: Counter[str] = Counter()
        self.warnings: list[str] = []
        self._own = [index for index, shard in enumerate(shards) if shard.source == source]
        # With fewer shards than lanes, lanes share them sample by sample.
        self._stride = num_lanes if len(self._own) < num_lanes else 1
        self._unusable_in_a_row = 0
        self._unreadable_in_a_row = 0
        self._last_unreadable: tuple[int, str] | None = None
        self._start_epoch(*cursor)

    @property
    def cursor(self) -> tuple[int, int]:
        return self.epoch, self.position

    def clear_reports(self) -> None:
        """Forgets the skipped samples and warnings that the owner has taken."""
        self.skipped.clear()
        self.warnings.clear()

    def prefetch(self) -> None:
        """Begins to fetch the shard that is read next, if it is remote."""
        place = bisect_right(self._ends, self._index_of(self.position))
        if place < len(self._order):
            self.shards[self._order[place]].prefetch()

    def take(self, count: int) -> list[Any]:
        """The next `count` usable samples.

        Raises:
            ConfigError: a whole epoch of the lane holds nothing usable, or a shard can't be read.
        """
        samples = []
        while len(samples) < count:
            while self.position >= self._num_samples:
                self._check_epoch()
                self._start_epoch(self.epoch + 1, 0)
            if not self._block:
                self._load_block()
            shard_index, raw = self._block.pop()
            sample = raw if isinstance(raw, Skip) else self._prepare(shard_index, raw)
            self.position += 1
            self._account(shard_index, sample)
            if not isinstance(sample, Skip):
                samples.append(sample)
        return samples

    def _prepare(self, shard_index: int, raw: RawSample) -> Any:
        try:
            return self.prepare(shard_index, raw, self.epoch, self.position)
        except ShardError as error:
            self._accept(error)
            return Skip("unreadable_shard")

    def _start_epoch(self, epoch: int, position: int) -> None:
        rng = _rng(self.source, SHARD_ORDER, self.seed, epoch)
        order = rng.permutation(len(self._own))
        self._offset = 0
        if self._stride == 1:
            order = order[self.lane :: self.num_lanes]
        else:
            # Another part of the samples for each lane in each epoch.
            self._offset = int(self.lane + rng.integers(self.num_lanes)) % self.num_lanes
        self.epoch, self.position = epoch, position
        self._order: list[int] = [self._own[place] for place in order]
        # The sample of these shards, one after the other, at which each of them ends.
        self._ends = list(accumulate(self.shards[index].num_samples for index in self._order))
        self._num_samples = len(range(self._offset, self._ends[-1], self._stride))
        self._raw, self._raw_position = None, -1
        self._started_at = position
        self._seen: Counter[int] = Counter()
        self._usable: Counter[int] = Counter()
        self._epoch_skips: Counter[str] = Counter()
        self._block: list[tuple[int, RawSample | Skip]] = []

    def _index_of(self, position: int) -> int:
        """The sample at a position, counted over the epoch's shards one after the other."""
        return self._offset + position * self._stride

    def _load_block(self) -> None:
        """Finds the samples of the cursor's block; the next one stands last, for pop."""
        block = self.position // self.shuffle_block
        first = block * self.shuffle_block
        last = min(first + self.shuffle_block, self._num_samples)
        if self._raw_position != first:
            self._raw = self._read_from(first)
        raw = [next(self._raw) for _ in range(first, last)]
        self._raw_position = last
        if last == self._num_samples:
            for _ in self._raw:  # only counts what lies beyond the last shard's index
                pass
        rng = _rng(self.source, BLOCK_ORDER, self.seed, self.epoch, self.lane, block)
        order = rng.permutation(last - first)[self.position - first :]
        self._block = [raw[index] for index in order[::-1]]

    def _read_from(self, position: int) -> Iterator[tuple[int, RawSample | Skip]]:
        """Yields (shard index, sample) of the lane's epoch in the order of its shards."""
        first_index = self._index_of(position)
        first = bisect_right(self._ends, first_index)
        for place in range(first, len(self._order)):
            shard_index = self._order[place]
            shard = self.shards[shard_index]
            if place + 1 < len(self._order):
                self.shards[self._order[place + 1]].prefetch()
            begin = self._ends[place] - shard.num_samples
            for index, raw in self._read_shard(shard, max(0, first_index - begin)):
                if index >= shard.num_samples:
                    if self._offset == 0:  # one of the lanes that share the shard
                        self.skipped[raw.kind] += 1
                elif (begin + index - self._offset) % self._stride == 0:
                    yield shard_index, raw

    def _read_shard(self, shard: Shard, start: int) -> Iterator[tuple[int, RawSample | Skip]]:
        """As read_shard; what can't be read is skipped where that is the policy."""
        following = start
        try:
            for index, raw in read_shard(shard, start):
                following = index + 1
                yield index, raw
        except ShardError as error:
            self._accept(error)
            for index in range(following, shard.num_samples):
                yield index, Skip("unreadable_shard")

    def _accept(self, error: ShardError) -> None:
        """Notes a shard that can't be read; raises where that, or so many of them, end the run."""
        if not self.skips_unreadable:
            raise error
        if (self.epoch, error.url) != self._last_unreadable:
            self._last_unreadable = (self.epoch, error.url)
            self._unreadable_in_a_row += 1
        if self._unreadable_in_a_row > MAX_UNREADABLE:
            raise ShardError(
                error.url,
                f"data lane {self.lane} found {self._unreadable_in_a_row} shards in a row that "
                f"can't be read, the last: {error}",
            ) from None
        self.warnings.append(f"{error}; its samples are skipped")

    def _account(self, shard_index: int, sample: Any) -> None:
        self._seen[shard_index] += 1
        if isinstance(sample, Skip):
            self.skipped[sample.kind] += 1
            self._epoch_skips[sample.kind] += 1
            self._unusable_in_a_row += 1
        else:
            self._usable[shard_index] += 1
            self._unusable_in_a_row = self._unreadable_in_a_row = 0
        shard = self.shards[shard_index]
        if self._seen[shard_index] == shard.num_samples and not self._usable[shard_index]:
            self.warnings.append(f"shard {shard.url} holds no usable sample")

    def _check_epoch(self) -> None:
        if self._usable or self._started_at > 0:
            return
        if self._stride > 1 and self._unusable_in_a_row < min(MAX_UNUSABLE, 20 * self._ends[-1]):
            return  # few samples are this lane's in one epoch: it draws others in the next
        if self._epoch_skips["unreadable_shard"]:
            return  # _accept says when it is too many
        urls = ", ".join(self.shards[index].url for index in self._order)
        kinds = ", ".join(f"{kind} {count}" for kind, count in self._epoch_skips.items())
        raise ConfigError(
            f"data lane {self.lane} found nothing usable in a whole epoch of its shards {urls} "
            f"({kinds}); repair them or remove them from data.train"
        )


def _nearest_divisors(number: int, wanted: int) -> str:
    divisors = [count for count in range(1, number + 1) if number % count == 0]
    below = [count for count in divisors if count <= wanted][-1:]
    above = [count for count in divisors if count > wanted][:1]
    return " or ".join(str(count) for count in below + above)
