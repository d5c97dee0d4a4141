"""What a lane can't use: counted for the log, and an error where it is too much to go on."""

from collections import Counter
from typing import Any

from aclip.data.shards.listing import Shard, Skip
from aclip.data.shards.tar import ShardError
from aclip.errors import ConfigError

MAX_UNREADABLE = 8
"""Shards in a row that a lane may find unreadable before the run ends, where they are skipped."""
MAX_UNUSABLE = 1000
"""Samples in a row that a lane may find unusable before the run ends, where lanes share shards."""
MAX_UNUSABLE_PASSES = 20
"""The same limit for small data sets, in samples of all shards."""


class Patience:
    """Counts what one lane can't use, and ends the run where nothing usable is left.

    Args:
        shards: all shards of the data set.
        lane: the lane's index, for messages.
        shares_shards: as LaneOrder's.
        skips_unreadable: whether the samples of a shard that can't be read are skipped; otherwise
            such a shard ends the run.

    Attributes:
        skipped: counts of skipped samples by kind, until the owner clears them.
        warnings: sentences about shards with nothing usable, likewise.
    """

    def __init__(
        self, shards: list[Shard], lane: int, shares_shards: bool, skips_unreadable: bool = False
    ):
        self.shards = shards
        self.lane = lane
        self.shares_shards = shares_shards
        self.skips_unreadable = skips_unreadable
        self.skipped: Counter[str] = Counter()
        self.warnings: list[str] = []
        self._unusable_in_a_row = 0
        self._unreadable_in_a_row = 0

    def start_epoch(self, position: int) -> None:
        """Begins to count an epoch, of which the samples from `position` on are read."""
        self._is_whole = position == 0
        self._last_unreadable: str | None = None
        self._seen: Counter[int] = Counter()
        self._usable: Counter[int] = Counter()
        self._epoch_skips: Counter[str] = Counter()

    def count_unlisted(self, skip: Skip) -> None:
        """Counts a sample that is beyond its shard's index and so belongs to no lane."""
        self.skipped[skip.kind] += 1

    def count(self, shard_index: int, sample: Any) -> None:
        """Counts a sample of the lane: a Skip is unusable, everything else usable."""
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

    def bear(self, error: ShardError) -> None:
        """Notes a shard that can't be read.

        Raises:
            ShardError: that, or so many of them in a row, ends the run.
        """
        if not self.skips_unreadable:
            raise error
        if error.url != self._last_unreadable:
            self._last_unreadable = error.url
            self._unreadable_in_a_row += 1
        if self._unreadable_in_a_row > MAX_UNREADABLE:
            raise ShardError(
                error.url,
                f"data lane {self.lane} found {self._unreadable_in_a_row} shards in a row that "
                f"can't be read, the last: {error}",
            ) from None
        self.warnings.append(f"{error}; its samples are skipped")

    def end_epoch(self, shard_indices: list[int]) -> None:
        """Checks that an epoch, which read these shards, held something usable.

        Raises:
            ConfigError: it did not, and the next one will not either.
        """
        if self._usable or not self._is_whole:
            return
        shards = [self.shards[index] for index in shard_indices]
        most = MAX_UNUSABLE_PASSES * sum(shard.num_samples for shard in shards)
        if self.shares_shards and self._unusable_in_a_row < min(MAX_UNUSABLE, most):
            return  # few samples are this lane's in one epoch: it draws others in the next
        if self._epoch_skips["unreadable_shard"]:
            return  # `bear` says when it is too many
        urls = ", ".join(shard.url for shard in shards)
        kinds = ", ".join(f"{kind} {count}" for kind, count in self._epoch_skips.items())
        raise ConfigError(
            f"data lane {self.lane} found nothing usable in a whole epoch of its shards {urls} "
            f"({kinds}); repair them or remove them from data.train"
        )
