"""Where samples begin in a shard: kept from one walk to the next, so that a later one starts there.

The offsets lie in the cache folder, one small file a shard. They only save time: whatever a file
holds, a walk gives the samples that a walk from the start does.
"""

import hashlib
import logging
import os
import struct
import sys
from typing import TYPE_CHECKING

from aclip.data.shards.cache import file_name
from aclip.data.shards.remote import is_remote
from aclip.errors import NotWritten
from aclip.files import cache_folder, write_whole

if TYPE_CHECKING:
    from aclip.data.shards.tar import RawSample

logger = logging.getLogger(__name__)

FOLDER = "offsets"
EVERY = 64
"""The offset of each sample is kept whose position is a multiple of this; in a small shard, of a
smaller power of two."""
MAX_ROWS = 256
"""How many offsets are kept before every second one is given up, down to one in EVERY. So a lane
that begins in a shard of up to so many samples begins at its very sample."""
LEAST = 16
"""Fewer samples than these are walked as fast as a file of their offsets is read and written."""
ROW = struct.Struct("<qq")
"""A file's first row is the shard's size and time, and its second one FORMAT and the distance of
the samples kept; each other one is a sample's offset and digest."""
FORMAT = -2


class SampleOffsets:
    """The offsets that are known of one shard, in bytes, and those that a walk finds.

    Args:
        url: the shard's path or address.
        size: the shard's size in bytes. With another size or time nothing is known of a shard.
        mtime_ns: time of the shard's last change; 0 if it is remote, where only the fetched copy
            has one.
    """

    _has_warned = False

    def __init__(self, url: str, size: int, mtime_ns: int):
        address = url if is_remote(url) else os.path.abspath(url)
        self._path = cache_folder() / FOLDER / file_name(address)
        self._stamp = (size, mtime_ns)
        self._every, self._rows = self._load()
        self._has_news = False

    def before(self, position: int) -> tuple[int, int]:
        """(position, offset) of the last sample up to `position` whose offset is known."""
        number = min(position // self._every, len(self._rows))
        return (number * self._every, self._rows[number - 1][0]) if number else (0, 0)

    def confirm(self, position: int, offset: int | None, sample: "RawSample") -> bool:
        """Whether this sample, found at an offset from `before`, is the one that was found there.

        It is another where a file of the same size and time has taken the shard's place, or where
        the offset is wrong. The position is part of what is compared.
        """
        return self._rows[position // self._every - 1] == (offset, _digest(position, sample))

    def note(self, position: int, offset: int | None, sample: "RawSample") -> None:
        """Takes up a sample of a walk, which shows every sample after the one it began with.

        Args:
            position: the sample's.
            offset: of its first header; None if a walk can't begin there.
            sample: what was found there.
        """
        if position == 0 or position % self._every or offset is None:
            return
        number = position // self._every - 1
        if number > len(self._rows):
            return  # behind samples where no walk can begin
        row = (offset, _digest(position, sample))
        if self._rows[number : number + 1] != [row]:
            self._rows[number:] = [row]  # where one row was wrong, so may be those that follow
            self._has_news = True
        if len(self._rows) > MAX_ROWS and self._every < EVERY:
            self._every, self._rows = 2 * self._every, self._rows[1::2]

    def store(self) -> None:
        """Writes what is new, unless the file holds it and more by now. Warns if it can't, once."""
        # A walk that ends with its process finds no module that it could write with.
        if not self._has_news or sys.is_finalizing():
            return
        self._has_news = False
        if len(self._rows) * self._every < LEAST:
            return
        every, rows = self._load()
        if every >= self._every:  # the more samples are known, the greater it is
            times = every // self._every
            ours = self._rows[times - 1 :: times]
            if rows[: len(ours)] == ours:
                return
        content = [self._stamp, (FORMAT, self._every), *self._rows]
        try:
            write_whole(self._path, b"".join(ROW.pack(*row) for row in content))
        except NotWritten as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return  # another thread of this process has just written it
            if not SampleOffsets._has_warned:
                SampleOffsets._has_warned = True
                logger.warning("offsets of samples are not cached: %s; set ACLIP_CACHE", error)

    def _load(self) -> tuple[int, list[tuple[int, int]]]:
        """The distance, and (offset, digest) of the samples at it, at twice the distance and so on;
        as many as are known."""
        try:
            stamp, (version, every), *rows = ROW.iter_unpack(self._path.read_bytes())
        except (OSError, ValueError, struct.error):  # absent, empty or damaged
            return 1, []
        size = self._stamp[0]
        is_ours = stamp == self._stamp and all(0 < offset < size for offset, _ in rows)
        if not is_ours or version != FORMAT or not 0 < every <= EVERY or EVERY % every:
            return 1, []
        return every, rows


def _digest(position: int, sample: "RawSample") -> int:
    """Tells a sample from others by its position, its key and where its members lie."""
    text = repr((position, sample.key, list(sample.members.items())))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], signed=True)
