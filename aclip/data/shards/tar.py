"""One tar of samples: where the members of each lie, found without reading their bytes."""

import io
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

from aclip.data.images.suffixes import is_litter
from aclip.data.shards.found import LINKS_ADVICE, join_words, printable, refusal_of_content
from aclip.data.shards.offsets import SampleOffsets
from aclip.data.shards.open_files import OPEN_FILES, OpenFile
from aclip.data.shards.remote import RemoteShards, is_remote
from aclip.errors import ConfigError

MAX_HEADER_BYTES = 2**20
"""The most bytes that a header may hold; a longer name or attribute means a corrupt header."""
# What tarfile raises on damaged headers, besides its own errors.
HEADER_ERRORS = (tarfile.TarError, EOFError, ValueError, IndexError, OverflowError, RecursionError)


class ShardError(ConfigError):
    """A shard can't be opened or read."""

    def __init__(self, url: str, message: str):
        super().__init__(message)
        self.url = url


class TarShard:
    """A shard: a walk over its headers, and bytes at any offset.

    Its file is one of OPEN_FILES, so it may be closed, and is opened again, between two reads.

    Args:
        url: a file's path, or an address that `remote` fetches.
        remote: how to fetch the shard; None for a local file.

    Attributes:
        size: in bytes.
        is_broken: whether the last walk found that the file is truncated or corrupt. A walk that is
            stopped before it comes to that place does not know.

    Raises:
        ShardError: the shard can't be opened or read. Later also: another file has taken its place.
    """

    def __init__(self, url: str, remote: RemoteShards | None = None):
        self.url = url
        self.is_broken = False
        self.size: int | None = None
        self._remote = remote
        self._open_files = OPEN_FILES  # of its own, because at exit the global goes first
        self.size = self._file().size

    def __del__(self):
        self._open_files.let_go(id(self))

    def read(self, offset: int, size: int) -> bytes:
        file = self._file()  # refers to it, so that it stays open while it is read
        try:
            return os.pread(file.descriptor, size, offset)
        except OSError as error:
            raise unreadable(self.url, error) from None

    def _file(self) -> OpenFile:
        return self._open_files.use(id(self), self._open)

    def _open(self) -> OpenFile:
        try:
            file = OpenFile(open_shard(self.url, self._remote))
        except OSError as error:
            raise unreadable(self.url, error) from None
        if self.size not in (None, file.size):
            raise ShardError(
                self.url,
                f"shard {self.url} had {self.size} bytes and now has {file.size}; leave shards as "
                "they are while they are read",
            )
        return file

    def walk(self, start: int = 0) -> "Iterator[RawSample]":
        """Yields the samples in order from position `start` on, as far as headers can be read.

        Members are grouped as webdataset does: neighbours whose paths agree up to the first dot of
        the file name are one sample. Of two members with one suffix the first counts. What other
        tools left among them (`is_litter`) is passed over. Links hold no bytes; they are noted in
        the sample that they belong to.

        The walk begins at the last sample up to `start` whose offset an earlier walk has kept.
        """
        mtime_ns = 0 if self._remote else self._file().mtime_ns
        offsets = SampleOffsets(self.url, self.size, mtime_ns)
        position, begin = offsets.before(start)
        samples = self._samples(begin)
        if position:
            found = next(samples, None)
            if found is None or not offsets.confirm(position, *found):
                position, samples = 0, self._samples(0)
            else:
                samples = chain([found], samples)
        try:
            for offset, sample in samples:
                offsets.note(position, offset, sample)
                if position == start:
                    offsets.store()  # now, as the rest may take as long as the run
                if position >= start:
                    yield sample
                position += 1
        finally:
            offsets.store()

    def first(self) -> "RawSample | None":
        """The first sample; None where there is none, or no header can be read."""
        found = next(self._samples(0), None)
        return None if found is None else found[1]

    def _samples(self, begin: int) -> "Iterator[tuple[int | None, RawSample]]":
        """Yields (offset of its first header, sample) from the header at `begin` on.

        The offset is None where a walk that begins there would miss a global header before it.
        """
        key, members, links, offset = None, {}, [], None
        for info, header in self._headers(begin):
            parts = split_name(info.name)
            if parts is None:
                continue
            if info.islnk() or info.issym():
                links.append(parts)
                continue
            if not info.isreg():
                continue
            if parts[0] != key:
                if members:
                    yield offset, self._sample(key, members, links)
                links = [link for link in links if link[0] == parts[0]]
                (key, _), members, offset = parts, {}, header
            members.setdefault(parts[1], (info.offset_data, info.size))
        if members:
            yield offset, self._sample(key, members, links)

    def _sample(
        self, key: str, members: dict[str, tuple[int, int]], links: list[tuple[str, str]]
    ) -> "RawSample":
        of_key = tuple(suffix for other, suffix in links if other == key)
        return RawSample(printable(key), members, self, of_key)

    def _headers(self, begin: int) -> Iterator[tuple[tarfile.TarInfo, int | None]]:
        """Yields (member, offset of its first header, or None as in _samples)."""
        self.is_broken = False
        end = begin
        try:
            with tarfile.open(
                fileobj=_HeaderFile(self, begin),
                mode="r:",
                encoding="utf-8",
                errors="surrogateescape",  # names that differ in such bytes stay different
            ) as archive:
                while (info := archive.next()) is not None:
                    archive.members = []  # tarfile would keep every header
                    # A size below zero would lead tarfile back to where it was.
                    if info.size < 0 or archive.offset <= end:
                        self.is_broken = True
                        return
                    end = archive.offset
                    # A long name's extended header comes first, and tarfile names its offset.
                    yield info, None if archive.pax_headers else info.offset
                # tarfile takes a corrupt header for the end; the true end is nothing or zeros.
                self.is_broken = any(self.read(archive.offset, tarfile.BLOCKSIZE))
        except ShardError:  # is a ValueError, but says nothing about headers
            raise
        except HEADER_ERRORS:
            self.is_broken = True
        if end == begin == 0 and self.is_broken:
            refusal = refusal_of_content(self.url, self.read(0, 512), self._remote is not None)
            if refusal is not None:
                raise ShardError(self.url, refusal)


def describe_members(url: str, remote: RemoteShards | None) -> str:
    """What a shard without samples holds: `holds 12 links and 1 folder`."""
    shard = TarShard(url, remote)
    if shard.size == 0:
        return "is an empty file"
    kinds: Counter[str] = Counter()
    for info, _ in shard._headers(0):
        if info.issym() or info.islnk():
            kinds["links"] += 1
        elif info.isdir():
            kinds["folders"] += 1
        else:
            kinds["files that belong to no sample"] += 1
    if not kinds:
        return "is no tar" if shard.is_broken else "is a tar of no files"
    parts = [f"{count:,} {kind}" for kind, count in kinds.most_common()]
    return f"holds {join_words(parts)}{LINKS_ADVICE if kinds['links'] else ''}"


def split_name(name: str) -> tuple[str, str] | None:
    """The key of a member's sample and its suffix in lower case, as webdataset splits its path;
    None where it belongs to no sample."""
    match = re.match(r"((?:.*/|)[^./]+)[.]([^/]*)\Z", name, re.DOTALL)
    if match is None or re.match(r"__[^/]*__($|/)", name) or is_litter(name):
        return None
    return match[1], match[2].lower()


class _HeaderFile:
    """The file that tarfile reads: refuses the sizes and places that corrupt headers name."""

    def __init__(self, source: TarShard, place: int):
        self._source = source
        self._place = place
        self._buffer, self._buffer_start = b"", 0

    def tell(self) -> int:
        return self._place

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError("a header is too long")
        first = self._place - self._buffer_start
        if not 0 <= first <= len(self._buffer) - size:
            self._buffer = self._source.read(self._place, max(size, io.DEFAULT_BUFFER_SIZE))
            self._buffer_start, first = self._place, 0
        content = self._buffer[first : first + size]
        self._place += len(content)
        return content

    def seek(self, offset: int) -> None:
        if not 0 <= offset <= self._source.size:
            raise tarfile.ReadError("a header points outside the file")
        self._place = offset


@dataclass(frozen=True, slots=True)
class RawSample:
    """Where one sample's members lie; their bytes are read when asked for."""

    key: str
    members: dict[str, tuple[int, int]]
    """Lower-case suffix -> (offset, size) in bytes."""
    source: TarShard
    links: tuple[str, ...] = ()
    """The suffixes of members that are links, for messages: a walk that begins at this sample does
    not see those before its first other member."""

    @property
    def is_complete(self) -> bool:
        return all(offset + size <= self.source.size for offset, size in self.members.values())

    def size(self, suffix: str) -> int:
        return self.members[suffix][1]

    def read(self, suffix: str) -> bytes:
        return self.source.read(*self.members[suffix])


def open_shard(url: str, remote: RemoteShards | None) -> io.BufferedReader:
    """Opens a shard for reading in binary; no other function does."""
    return open(url, "rb") if remote is None else remote.open(url)


def unreadable(url: str, error: OSError) -> ShardError:
    advice = "address" if is_remote(url) else "file"
    reason = error.strerror or error
    return ShardError(url, f"shard {url} can't be read: {reason}; check the {advice}")
