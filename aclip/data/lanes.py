"""The order of samples: V virtual lanes, the same order for any ranks x workers that divides V.

An epoch deals a seeded permutation of the shards to the lanes; a lane reads its shards in order and
shuffles blocks of consecutive samples. A cursor (epoch, position) says which sample comes next; it
counts every sample of the lane's epoch, usable or not, so a bad one never shifts the others.
"""

import logging
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any

import numpy as np

from aclip.data.shards import RawSample, Shard, Skip, read_shard
from aclip.errors import ConfigError

logger = logging.getLogger(__name__)

MAX_WORKERS = 8

# First word of each seed, so that two uses of the same numbers draw different streams.
SHARD_ORDER, BLOCK_ORDER, SAMPLE = 1, 2, 3


def sample_rng(seed: int, lane: int, epoch: int, position: int) -> np.random.Generator:
    """The generator of everything random about one sample."""
    return np.random.default_rng([SAMPLE, seed, lane, epoch, position])


def resolve_lanes(lanes: int | None, num_shards: int, global_batch_size: int) -> int:
    """The number of lanes: as given, or the largest divisor of the batch that shards suffice for.

    It never depends on the number of ranks, so that a run keeps its order on another number.

    Raises:
        ConfigError: `lanes` does not divide the batch, or there are fewer shards than lanes.
    """
    if lanes is None:
        most = min(num_shards, global_batch_size)
        return next(count for count in range(most, 0, -1) if global_batch_size % count == 0)
    if global_batch_size % lanes:
        raise ConfigError(
            f"data.lanes is {lanes}, which does not divide train.global_batch_size "
            f"{global_batch_size}; set data.lanes to a divisor, or leave it empty"
        )
    if lanes > num_shards:
        raise ConfigError(
            f"data.lanes is {lanes}, but there are fewer shards than lanes ({num_shards}); set "
            f"data.lanes to {num_shards} or less, or split the data into more shards"
        )
    return lanes


def resolve_workers(workers: int | None, lanes: int, world_size: int, cores_per_rank: int) -> int:
    """Worker processes of a rank: as given, or the largest number that cores and lanes allow.

    Raises:
        ConfigError: ranks x workers does not divide the lanes; 0 workers count as 1.
    """
    if lanes % world_size:
        raise ConfigError(
            f"{world_size} ranks do not divide the {lanes} data lanes; run on "
            f"{_nearest_divisors(lanes, world_size)} ranks, or set data.lanes to a multiple of the "
            "ranks (there must be as many shards and it must divide train.global_batch_size)"
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
    """Endless stream of one lane's usable samples.

    Args:
        shards: of the whole data set, in the recipe's order.
        lane: index of this lane.
        num_lanes: of all.
        seed: of the run.
        shuffle_block: samples shuffled together.
        cursor: (epoch, position) of the sample to start with.
        prepare: called as prepare(shard_index, raw, epoch, position); gives the sample, or Skip.

    Attributes:
        epoch, position: the cursor of the next sample.
        skipped: counts of skipped samples by kind, for the owner to take and clear.
        unusable_shards: urls of shards that turned out to hold nothing usable, likewise.
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
    ):
        self.shards = shards
        self.lane = lane
        self.num_lanes = num_lanes
        self.seed = seed
        self.shuffle_block = shuffle_block
        self.prepare = prepare
        self.skipped: Counter[str] = Counter()
        self.unusable_shards: list[str] = []
        self._start_epoch(*cursor)

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
            sample = raw
            if not isinstance(raw, Skip):
                sample = self.prepare(shard_index, raw, self.epoch, self.position)
            self.position += 1
            self._account(shard_index, sample)
            if not isinstance(sample, Skip):
                samples.append(sample)
        return samples

    def _start_epoch(self, epoch: int, position: int) -> None:
        rng = np.random.default_rng([SHARD_ORDER, self.seed, epoch])
        order = rng.permutation(len(self.shards))[self.lane :: self.num_lanes]
        self.epoch, self.position = epoch, position
        self._order: list[int] = order.tolist()
        # Position in the lane's epoch at which each of its shards ends.
        self._ends = list(accumulate(self.shards[index].num_samples for index in self._order))
        self._num_samples = self._ends[-1]
        self._raw, self._raw_position = None, -1
        self._started_at = position
        self._seen: Counter[int] = Counter()
        self._usable: Counter[int] = Counter()
        self._epoch_skips: Counter[str] = Counter()
        self._block: list[tuple[int, RawSample | Skip]] = []

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
        rng = np.random.default_rng([BLOCK_ORDER, self.seed, self.epoch, self.lane, block])
        order = rng.permutation(last - first)[self.position - first :]
        self._block = [raw[index] for index in order[::-1]]

    def _read_from(self, position: int) -> Iterator[tuple[int, RawSample | Skip]]:
        """Yields (shard index, sample) of the lane's epoch in the order of its shards."""
        first = bisect_right(self._ends, position)
        for place in range(first, len(self._order)):
            shard = self.shards[self._order[place]]
            begin = self._ends[place] - shard.num_samples
            for index, raw in read_shard(shard, max(0, position - begin)):
                if index < shard.num_samples:
                    yield self._order[place], raw
                else:
                    self.skipped[raw.kind] += 1

    def _account(self, shard_index: int, sample: Any) -> None:
        self._seen[shard_index] += 1
        if isinstance(sample, Skip):
            self.skipped[sample.kind] += 1
            self._epoch_skips[sample.kind] += 1
        else:
            self._usable[shard_index] += 1
        shard = self.shards[shard_index]
        if self._seen[shard_index] == shard.num_samples and not self._usable[shard_index]:
            self.unusable_shards.append(shard.url)

    def _check_epoch(self) -> None:
        if self._usable or self._started_at > 0:
            return
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
