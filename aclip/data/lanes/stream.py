"""One lane's samples, read from the shards in the lane's order.

A cursor (epoch, position) says which sample comes next. It counts every sample of the lane's epoch,
usable or not, so that a bad one never shifts the others.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import zip_longest
from typing import Any

from aclip.data.lanes.order import LaneOrder
from aclip.data.lanes.patience import Patience
from aclip.data.shards.listing import Shard, Skip, read_shard
from aclip.data.shards.tar import RawSample, ShardError


class LaneStream:
    """Endless stream of one lane's usable samples, from one source.

    Args:
        shards: all shards of the data set.
        order: says which of their samples come, and when.
        cursor: (epoch, position) of the sample to start with.
        prepare: called as prepare(shard_index, raw, epoch, position); gives the sample, or Skip.
        skips_unreadable: whether the samples of a shard that can't be read are skipped; otherwise
            such a shard raises.

    Attributes:
        epoch, position: the cursor of the next sample.
    """

    def __init__(
        self,
        shards: list[Shard],
        order: LaneOrder,
        cursor: tuple[int, int],
        prepare: Callable[[int, RawSample, int, int], Any],
        skips_unreadable: bool = False,
    ):
        self.shards = shards
        self.order = order
        self.prepare = prepare
        self._patience = Patience(shards, order.lane, order.shares_shards, skips_unreadable)
        self._start_epoch(*cursor)

    @property
    def cursor(self) -> tuple[int, int]:
        return self.epoch, self.position

    @property
    def skipped(self) -> Counter[str]:
        """Counts of skipped samples by kind since the last call of clear_reports."""
        return self._patience.skipped

    @property
    def warnings(self) -> list[str]:
        """Sentences about shards with nothing usable since the last call of clear_reports."""
        return self._patience.warnings

    def clear_reports(self) -> None:
        """Forgets the skipped samples and warnings that the owner has taken."""
        self.skipped.clear()
        self.warnings.clear()

    def prefetch(self) -> None:
        """Begins to fetch the shard that is read next, if it is remote."""
        for span in self._this_epoch.spans_from(self.position)[:1]:
            self.shards[span.shard].prefetch()

    def take(self, count: int) -> list[Any]:
        """The next `count` usable samples.

        Raises:
            ConfigError: a whole epoch of the lane holds nothing usable, or a shard can't be read.
        """
        samples = []
        while len(samples) < count:
            while self.position >= self._this_epoch.num_samples:
                self._patience.end_epoch([span.shard for span in self._this_epoch.spans])
                self._start_epoch(self.epoch + 1, 0)
            if not self._block:
                self._load_block()
            shard_index, raw = self._block.pop()
            sample = raw if isinstance(raw, Skip) else self._prepare(shard_index, raw)
            self.position += 1
            self._patience.count(shard_index, sample)
            if not isinstance(sample, Skip):
                samples.append(sample)
        return samples

    def _start_epoch(self, epoch: int, position: int) -> None:
        self.epoch, self.position = epoch, position
        self._this_epoch = self.order.epoch(epoch)
        self._patience.start_epoch(position)
        self._reader, self._num_read = None, -1
        self._block: list[tuple[int, RawSample | Skip]] = []

    def _prepare(self, shard_index: int, raw: RawSample) -> Any:
        try:
            return self.prepare(shard_index, raw, self.epoch, self.position)
        except ShardError as error:
            self._patience.bear(error)
            return Skip("unreadable_shard")

    def _load_block(self) -> None:
        """Finds the samples of the cursor's block; the next one stands last, for pop."""
        block = self._this_epoch.block(self.position)
        if self._num_read != block.start:
            self._reader = self._read_from(block.start)
        raw = [next(self._reader) for _ in block]
        self._num_read = block.stop
        if block.stop == self._this_epoch.num_samples:
            for _ in self._reader:  # only counts what lies beyond the last shard's index
                pass
        order = self._this_epoch.shuffled(block)[self.position - block.start :]
        self._block = [raw[index] for index in order[::-1]]

    def _read_from(self, num_read: int) -> Iterator[tuple[int, RawSample | Skip]]:
        """Yields (shard index, sample) of the epoch's spans, without the first `num_read`."""
        spans = self._this_epoch.spans_from(num_read)
        for span, following in zip_longest(spans, spans[1:]):
            if following is not None:
                self.shards[following.shard].prefetch()
            shard = self.shards[span.shard]
            for index, raw in self._read_shard(shard, span.samples.start):
                if index in span.samples:
                    yield span.shard, raw
                elif index >= shard.num_samples and self._this_epoch.counts_unlisted:
                    self._patience.count_unlisted(raw)

    def _read_shard(self, shard: Shard, start: int) -> Iterator[tuple[int, RawSample | Skip]]:
        """As read_shard; what can't be read is skipped where that is the policy."""
        following = start
        try:
            for index, raw in read_shard(shard, start):
                following = index + 1
                yield index, raw
        except ShardError as error:
            self._patience.bear(error)
            for index in range(following, shard.num_samples):
                yield index, Skip("unreadable_shard")
