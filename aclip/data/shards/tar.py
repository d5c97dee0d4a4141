"""One tar of samples: where the members of each lie, found without reading their bytes."""

import io
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass

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
    """An open shard: a walk over its headers, and bytes at any offset.

    Args:
        url: a file's path, or an address that `remote` fetches.
        remote: how to fetch the shard; None for a local file.

    Raises:
        ShardError: the shard can't be opened or read.
    """

    def __init__(self, url: str, remote: RemoteShards | None = None):
        self.url = url
        self.is_broken = False
        """Whether the last walk ended before the archive did: the file is truncated or corrupt."""
        try:
            self._file = open_shard(url, remote)
            self.size = os.fstat(self._file.fileno()).st_size
        except OSError as error:
            raise unreadable(url, error) from None

    def __del__(self):
        if hasattr(self, "_file"):
            self._file.close()

    def read(self, offset: int, size: int) -> bytes:
        # pread, because a walk over the headers may stand elsewhere in the same file.
        try:
            return os.pread(self._file.fileno(), size, offset)
        except OSError as error:
            raise unreadable(self.url, error) from None

    def walk(self) -> "Iterator[RawSample]":
        """Yields the samples in order, as far as the headers can be read.

        Members are grouped as webdataset does: neighbours whose paths agree up to the first dot of
        the file name are one sample. Of two members with one suffix the first counts.
        """
        key, members = None, {}
        for info in self._headers():
            match = re.match(r"^((?:.*/|)[^./]+)[.]([^/]*)$", info.name)
            if not info.isreg() or match is None or re.match(r"__[^/]*__($|/)", info.name):
                continue
            if match[1] != key:
                if members:
                    yield RawSample(key, members, self)
                key, members = match[1], {}
            members.setdefault(match[2].lower(), (info.offset_data, info.size))
        if members:
            yield RawSample(key, members, self)

    def _headers(self) -> Iterator[tarfile.TarInfo]:
        self._file.seek(0)
        self.is_broken = True
        end = 0
        try:
            with tarfile.open(
                fileobj=_HeaderFile(self._file), mode="r:", encoding="utf-8", errors="replace"
            ) as archive:
                while (info := archive.next()) is not None:
                    archive.members = []  # tarfile would keep every header
                    # A size below zero would lead tarfile back to where it was.
                    if info.size < 0 or archive.offset <= end:
                        return
                    end = archive.offset
                    yield info
                # tarfile takes a corrupt header for the end; the true end is nothing or zeros.
                self.is_broken = any(self.read(archive.offset, tarfile.BLOCKSIZE))
        except HEADER_ERRORS:
            return
        except OSError as error:
            raise unreadable(self.url, error) from None


class _HeaderFile:
    """The file that tarfile reads: refuses the sizes and places that corrupt headers name."""

    def __init__(self, file: io.BufferedReader):
        self._file = file
        self.tell = file.tell

    def read(self, size: int) -> bytes:
        if size > MAX_HEADER_BYTES:
            raise tarfile.ReadError("a header is too long")
        return self._file.read(size)

    def seek(self, offset: int) -> None:
        if offset < 0:
            raise tarfile.ReadError("a header points before the start")
        self._file.seek(offset)


@dataclass(frozen=True, slots=True)
class RawSample:
    """Where one sample's members lie; their bytes are read when asked for."""

    key: str
    members: dict[str, tuple[int, int]]
    """Lower-case suffix -> (offset, size) in bytes."""
    source: TarShard

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
