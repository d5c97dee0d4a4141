"""One lane's samples, read from the shards in the lane's order.

A cursor (epoch, position, given) says which sample comes next. The position counts every sample of
the lane's epoch, usable or not, so that a bad one never shifts the others. The epoch ends when as
many usable samples are given as the lane's part holds, in the same step for all lanes: for each bad
sample the lane reads on by one behind its part, which then comes twice in the epoch.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from aclip.data.lanes.order import LaneOrder, Place, Span
from aclip.data.lanes.patience import Patience
from aclip.data.shards.listing import Shard, Skip, read_shard
from aclip.data.shards.tar import RawSample, ShardError


class LaneStream:
    """Endless stream of one lane's usable samples, from one source.

    Args:
        shards: all shards of the data set.
        order: says which of their samples come, and when.
        cursor: (epoch, position, given) of the sample to start with.
        prepare: called as prepare(place, raw); gives the sample, or Skip.
        skips_unreadable: whether the samples of a shard that can't be read are skipped; otherwise
            such a shard raises.

    Attributes:
        epoch, position: of the next sample.
        given: number of usable samples that the epoch has given.
        repeated: number of samples read in place of unusable ones since the last call of
            clear_reports.
    """

    def __init__(
        self,
        shards: list[Shard],
        order: LaneOrder,
        cursor: tuple[int, int, int],
        prepare: Callable[[Place, RawSample], Any],
        skips_unreadable: bool = False,
    ):
        self.shards = shards
        self.order = order
        self.prepare = prepare
        self.repeated = 0
        sizes = order.source.sizes.values()
        self._patience = Patience(shards, order.lane, sizes, skips_unreadable)
        self._start_epoch(*cursor)

    @property
    def cursor(self) -> tuple[int, int, int]:
        return self.epoch, self.position, self.given

    @property
    def skipped(self) -> Counter[str]:
        """Counts of skipped samples by kind since the last call of clear_reports."""
        return self._patience.skipped

    @property
    def warnings(self) -> list[str]:
        """Sentences about shards with nothing usable since the last call of clear_reports."""
        return self._patience.warnings

    def clear_reports(self) -> None:
        """Forgets the skipped and repeated samples and warnings that the owner has taken."""
        self.skipped.clear()
        self.warnings.clear()
        self.repeated = 0

    def prefetch(self) -> None:
        """Begins to fetch the shard that is read next, if it is remote."""
        block = self._this_epoch.block(self.position)
        self._prefetch_at(block.start)

    def take(self, count: int) -> list[Any]:
        """The next `count` usable samples.

        Raises:
            ConfigError: too many samples in a row are unusable, or a shard can't be read.
        """
        samples = []
        while len(samples) < count:
            while self.given >= self._this_epoch.num_samples:
                self._start_epoch(self.epoch + 1, 0, 0)
            if not self._block:
                self._load_block()
            span, index, raw = self._block.pop()
            stands_in = self.position >= self._this_epoch.num_samples
            is_first = span.number == self.epoch and not stands_in
            place = Place(span.shard, index, self.epoch, self.position, is_first)
            sample = raw if isinstance(raw, Skip) else self._prepare(place, raw)
            self._patience.count(span.shard, sample)
            if not isinstance(sample, Skip):
                samples.append(sample)
                self.given += 1
                self.repeated += stands_in
            self.position += 1
        return samples

    def _start_epoch(self, epoch: int, position: int, given: int) -> None:
        self.epoch, self.position, self.given = epoch, position, given
        self._this_epoch = self.order.epoch(epoch)
        part = self._this_epoch.spans(range(position, self._this_epoch.num_samples))
        self._patience.start_epoch(part if position == 0 else [])
        self._reader, self._reads_next = None, None
        self._block: list[tuple[Span, int, RawSample | Skip]] = []

    def _prepare(self, place: Place, raw: RawSample) -> Any:
        try:
            return self.prepare(place, raw)
        except ShardError as error:
            self._patience.bear(error)
            return Skip("unreadable_shard")

    def _load_block(self) -> None:
        """Finds the samples of the cursor's block; the next one stands last, for pop."""
        block = self._this_epoch.block(self.position)
        raw, place = [], block.start
        for span in self._this_epoch.spans(block):
            raw += self._read(span, place)
            place += len(span.samples)
        order = self._this_epoch.shuffled(block)[self.position - block.start :]
        self._block = [raw[index] for index in order[::-1]]

    def _read(self, span: Span, place: int) -> list[tuple[Span, int, RawSample | Skip]]:
        """(span, position in the shard, sample) of the span's samples, which are read at the
        lane's positions from `place` on."""
        shard = self.shards[span.shard]
        if self._reads_next != (span.shard, span.samples.start):
            # Goes on from block to block, so that a shard is walked once.
            self._reader = self._read_shard(shard, span.samples.start)
            self._prefetch_at(self._this_epoch.end_of_span(place))
        self._reads_next = span.shard, span.samples.stop
        samples = [(span, index, next(self._reader)) for index in span.samples]
        if span.samples.stop == shard.num_samples:
            for unlisted in self._reader:
                self._patience.count_unlisted(unlisted)
        return samples

    def _read_shard(self, shard: Shard, start: int) -> Iterator[RawSample | Skip]:
        """As read_shard, without positions; what can't be read is skipped where that is the
        policy."""
        following = start
        try:
            for index, raw in read_shard(shard, start):
                following = index + 1
                yield raw
        except ShardError as error:
            self._patience.bear(error)
            for _ in range(following, shard.num_samples):
                yield Skip("unreadable_shard")

    def _prefetch_at(self, place: int) -> None:
        """Begins to fetch the shard that is read at a position of this epoch, or at the beginning
        of the next one."""
        lane_epoch = self._this_epoch
        if place >= lane_epoch.num_samples:
            lane_epoch, place = self.order.epoch(self.epoch + 1), 0
        for span in lane_epoch.spans(range(place, place + 1)):
            self.shards[span.shard].prefetch()
