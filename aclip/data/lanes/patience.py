"""What a lane can't use: counted for the log, and an error where it is too much to go on."""

from collections import Counter
from collections.abc import Collection
from typing import Any

from aclip.data.lanes.order import Span
from aclip.data.shards.found import LINK, LINKS_ADVICE, join_words
from aclip.data.shards.listing import Shard, Skip
from aclip.data.shards.tar import ShardError
from aclip.errors import ConfigError

MAX_UNREADABLE = 8
"""Shards in a row that a lane may find unreadable before the run ends, where they are skipped."""
MAX_UNUSABLE = 1000
"""Samples in a row that a lane may find unusable before the run ends; in any case those of more
than MAX_UNREADABLE shards."""
MAX_UNUSABLE_PASSES = 20
"""The same limit for small data sets, in samples of all shards."""
MAX_FOUND = 3
"""How often a lane names what it found in samples that lack an image or a caption."""
MANY = 10
"""Samples of a shard that are rarely all unusable by chance."""


class Patience:
    """Counts what one lane can't use, and ends the run where nothing usable is left.

    Args:
        shards: all shards of the data set.
        lane: the lane's index, for messages.
        sizes: the numbers of samples of the source's shards.
        skips_unreadable: whether the samples of a shard that can't be read are skipped; otherwise
            such a shard ends the run.

    Attributes:
        skipped: counts of skipped samples by kind, until the owner clears them.
        warnings: sentences about shards with nothing usable, likewise.
    """

    def __init__(
        self, shards: list[Shard], lane: int, sizes: Collection[int], skips_unreadable: bool = False
    ):
        self.shards = shards
        self.lane = lane
        self.skips_unreadable = skips_unreadable
        self.skipped: Counter[str] = Counter()
        self.warnings: list[str] = []
        enough = max(MAX_UNUSABLE, (MAX_UNREADABLE + 1) * max(sizes))
        self._most_unusable = min(enough, MAX_UNUSABLE_PASSES * sum(sizes))
        self._unusable: Counter[str] = Counter()
        self._unusable_shards: dict[str, None] = {}
        self._unreadable_in_a_row = 0
        self._found: set[tuple[str, tuple[str, ...]]] = set()

    def start_epoch(self, part: list[Span]) -> None:
        """Begins to count an epoch, in which the lane is to read these samples."""
        self._last_unreadable: str | None = None
        self._left: Counter[int] = Counter()
        for span in part:
            self._left[span.shard] += len(span.samples)
        self._of_shard = dict(self._left)
        self._usable: set[int] = set()

    def count_unlisted(self, skip: Skip) -> None:
        """Counts a sample that is beyond its shard's index and so belongs to no lane."""
        self.skipped[skip.kind] += 1

    def count(self, shard_index: int, sample: Any) -> None:
        """Counts a sample of the lane: a Skip is unusable, everything else usable.

        Raises:
            ConfigError: so many in a row are unusable that others will hardly follow.
        """
        if isinstance(sample, Skip):
            self.skipped[sample.kind] += 1
            self._unusable[sample.kind] += 1
            self._unusable_shards[self.shards[shard_index].url] = None
            if sample.found and len(self._found) < MAX_FOUND:
                self._name_found(sample)
        else:
            self._usable.add(shard_index)
            self._unusable.clear()
            self._unusable_shards.clear()
            self._unreadable_in_a_row = 0
        self._left[shard_index] -= 1
        if self._left[shard_index] == 0 and shard_index not in self._usable:
            self._warn_of(shard_index)
        if self._unusable.total() >= self._most_unusable:
            self._give_up()

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

    def _name_found(self, skip: Skip) -> None:
        # Names no lane and no shard, so that the same words of many lanes are said once.
        if (skip.kind, skip.found) not in self._found:
            self._found.add((skip.kind, skip.found))
            found = join_words([*skip.found])
            self.warnings.append(
                f"samples are skipped as {skip.kind}, in which {found} "
                f"{'was' if len(skip.found) == 1 else 'were'} found"
                f"{LINKS_ADVICE if LINK in found else ''}"
            )

    def _warn_of(self, shard_index: int) -> None:
        """Says that nothing of a shard was usable: of all of it, or of what the lane took of it."""
        shard, number = self.shards[shard_index], self._of_shard[shard_index]
        if number == shard.num_samples:
            self.warnings.append(f"shard {shard.url} holds no usable sample")
        elif number >= MANY:
            self.warnings.append(
                f"shard {shard.url} holds no usable sample among the {number} that data lane "
                f"{self.lane} took of it"
            )

    def _give_up(self) -> None:
        urls = list(self._unusable_shards)
        named = ", ".join(urls[: MAX_UNREADABLE + 1])
        if len(urls) > MAX_UNREADABLE + 1:
            named += f" and {len(urls) - MAX_UNREADABLE - 1} more"
        kinds = ", ".join(f"{kind} {count}" for kind, count in self._unusable.items())
        found = [join_words([*suffixes]) for _, suffixes in sorted(self._found)]
        held = f"; samples held {', or '.join(found)}" if found else ""
        raise ConfigError(
            f"data lane {self.lane} found nothing usable in {self._unusable.total()} samples in a "
            f"row ({kinds}), of the shards {named}{held}; repair them or take them out "
            "of the data"
        )
