"""One tar of samples: where the members of each lie, found without reading their bytes."""

import io
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass

from aclip.data.remote import RemoteShards, is_remote
from aclip.errors import ConfigError


class ShardError(ConfigError):
    """A shard can't be opened or read."""

    def __init__(self, url: str, message: str):
        super().__init__(message)
        self.url = url


class TarShard:
    """An open shard: a walk over its headers, and bytes at any offset.

    Args:
        url: a file, or what `remote` fetches.
        remote: how to fetch it; None for a local file.

    Raises:
        ShardError: it can't be opened or read.
    """

    def __init__(self, url: str, remote: RemoteShards | None = None):
        self.url = url
        self.is_broken = False
        """The last walk ended where the archive does not: the file is truncated or corrupt."""
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
        try:
            with tarfile.open(fileobj=self._file, mode="r:") as archive:
                while (info := archive.next()) is not None:
                    archive.members = []  # tarfile would keep every header
                    yield info
                # tarfile takes a corrupt header for the end; the true end is nothing or zeros.
                self.is_broken = any(self.read(archive.offset, tarfile.BLOCKSIZE))
        except (tarfile.TarError, EOFError):
            return
        except OSError as error:
            raise unreadable(self.url, error) from None


@dataclass(frozen=True, slots=True)
class RawSample:
    """Where the members of one sample lie; bytes are read when asked for."""

    key: str
    members: dict[str, tuple[int, int]]
    """Lower-case suffix -> (offset, size) in bytes."""
    source: TarShard

    @property
    def is_complete(self) -> bool:
        return all(offset + size <= self.source.size for offset, size in self.members.values())

    def read(self, suffix: str) -> bytes:
        return self.source.read(*self.members[suffix])


def open_shard(url: str, remote: RemoteShards | None) -> io.BufferedReader:
    """The only place that opens a shard."""
    return open(url, "rb") if remote is None else remote.open(url)


def unreadable(url: str, error: OSError) -> ShardError:
    advice = "address" if is_remote(url) else "file"
    reason = error.strerror or error
    return ShardError(url, f"shard {url} can't be read: {reason}; check the {advice}")
