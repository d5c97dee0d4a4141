"""A folder of fetched shards with a size limit, shared by all processes of a machine.

A file appears complete or not at all. The least recently opened files are removed first, but never
one that a process reads. Processes agree through locks on files, which end with their holder.

What goes wrong in the folder is never taken for a fault of a shard: it is NotWritten.
"""

import errno
import fcntl
import hashlib
import io
import logging
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from filelock import FileLock

from aclip.errors import ConfigError, NotWritten
from aclip.files import check_writable
from aclip.lock import NO_LOCKS

logger = logging.getLogger(__name__)

SUFFIX = ".shard"
PARTIAL = ".partial"
EVICTION = "evict.lock"
FULL = (errno.ENOSPC, errno.EDQUOT)


class CacheFull(NotWritten):
    """The folder's disk, or a quota, is full of files that are in use."""


class _NotFetched(Exception):
    """Holds an OSError of the transfer, apart from those of the folder."""


class ShardCache:
    """Fetched shards, found by their url.

    Args:
        folder: where the files lie; made on first use.
        limit: number of bytes that the folder may hold, besides what is being fetched or read.
    """

    _warned: set[Path] = set()

    def __init__(self, folder: Path, limit: int):
        self.folder = folder
        self.limit = limit

    def check(self) -> None:
        """Refuses a folder that can't be used, before anything is fetched.

        Raises:
            ConfigError: it can't be written, or its file system knows no locks.
        """
        check_writable(self.folder, "data.cache")
        try:
            with open(self.folder / EVICTION, "a") as file, suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(self._refusal(error)) from None

    def open(self, url: str, fetch: Callable[[Path], None]) -> io.BufferedReader:
        """Opens the shard of `url`; if it is absent, `fetch(path)` writes it, in one process.

        Where the disk is full, shards that nobody reads make room, and `fetch` is called again.

        Raises:
            OSError: `fetch` raised it, for another reason than a full disk.
            CacheFull: the disk is full, and nothing can be removed.
            NotWritten: the folder can't be written, or knows no locks.
        """
        while True:
            try:
                return self._open(url, fetch)
            except _NotFetched as failure:
                raise failure.__cause__ from None
            except OSError as error:
                is_full = error.errno in FULL
                if not (is_full and self._make_room()):
                    raise (CacheFull if is_full else NotWritten)(self._refusal(error)) from error

    def _open(self, url: str, fetch: Callable[[Path], None]) -> io.BufferedReader:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path(url)
        file = _open_locked(path)
        if file is not None:
            return file
        with FileLock(path.with_suffix(".lock")):
            file = _open_locked(path)  # another process may have been faster
            if file is None:
                file = self._fill(path, fetch)
        self._evict()
        return file

    def holds(self, url: str) -> bool:
        return self._path(url).exists()

    def _path(self, url: str) -> Path:
        return self.folder / (file_name(url) + SUFFIX)

    def _fill(self, path: Path, fetch: Callable[[Path], None]) -> io.BufferedReader:
        partial = path.with_suffix(f".{os.getpid()}{PARTIAL}")
        with FileLock(self.folder / EVICTION):
            partial.touch()
            in_use = _open_locked(partial)
        try:
            _fetch_apart(fetch, partial)
            file = _open_locked(partial)  # again, since fetch may have replaced the file
            os.replace(partial, path)
            return file
        finally:
            in_use.close()
            partial.unlink(missing_ok=True)

    def _evict(self) -> None:
        """Removes shards that nobody reads, oldest first, until the rest is within the limit, and
        the disk has room for another one as large as the largest."""
        with FileLock(self.folder / EVICTION):
            files = self._files()
            sizes = [status.st_size for _, status in files]
            excess = sum(sizes) - self.limit
            lacking = max(sizes, default=0) - shutil.disk_usage(self.folder).free
            for path, status in files:
                is_left_over = path.name.endswith(PARTIAL)
                if (excess > 0 or lacking > 0 or is_left_over) and _remove_unless_used(path):
                    excess -= status.st_size
                    lacking -= status.st_size
        if excess > 0 and self.folder not in self._warned:
            self._warned.add(self.folder)
            logger.warning(
                "the shards that are read at once fill %s beyond its limit of %.1f GB, by %.1f GB; "
                "raise data.cache_gb, or, in a new run, lower data.lanes",
                self.folder,
                self.limit / 1e9,
                excess / 1e9,
            )

    def _make_room(self) -> bool:
        """Removes shards that nobody reads, oldest first, as large together as the largest; returns
        whether there was one."""
        has_room = False
        # A folder that can't even be locked is reported as full.
        with suppress(OSError), FileLock(self.folder / EVICTION):
            files = self._files()
            lacking = max((status.st_size for _, status in files), default=0)
            for path, status in files:
                if lacking > 0 and _remove_unless_used(path):
                    lacking -= status.st_size
                    has_room = True
        return has_room

    def _refusal(self, error: OSError) -> str:
        reason = error.strerror or str(error)
        if error.errno in NO_LOCKS:
            return (
                f"data.cache is {self.folder}, whose file system knows no locks ({reason}); set "
                "data.cache to a folder on another one, such as a local disk"
            )
        if error.errno not in FULL:
            return (
                f"data.cache is {self.folder}, which can't be written ({reason}); make it "
                "writable, or set data.cache to another folder"
            )
        held = [status.st_size for _, status in self._files()]
        return (
            f"the cache folder {self.folder} is full ({reason}): {len(held)} shards with "
            f"{sum(held) / 1e9:.1f} GB are in use there, and data.cache_gb would allow "
            f"{self.limit / 1e9:g} GB; make room on that disk, set data.cache to a folder on a "
            "larger one, or, in a new run, lower data.lanes and data.shuffle_block, by which so "
            "many are read at once"
        )

    def _files(self) -> list[tuple[Path, os.stat_result]]:
        """What lies in the folder, the least recently opened first."""
        files = []
        for path in self.folder.glob("*"):
            if path.name.endswith((SUFFIX, PARTIAL)):
                try:
                    files.append((path, path.stat()))
                except FileNotFoundError:  # renamed or removed meanwhile
                    continue
        return sorted(files, key=lambda entry: entry[1].st_mtime_ns)


def _fetch_apart(fetch: Callable[[Path], None], path: Path) -> None:
    try:
        fetch(path)
    except OSError as error:
        if error.errno in FULL:
            raise
        raise _NotFetched from error


def _open_locked(path: Path) -> io.BufferedReader | None:
    """The file with a shared lock, marked as just used; None if it is absent."""
    try:
        file = open(path, "rb")  # noqa: SIM115 - handed to the caller
    except FileNotFoundError:
        return None
    fcntl.flock(file, fcntl.LOCK_SH)
    with suppress(PermissionError):  # another user's, in a cache that users share
        os.utime(file.fileno())
    return file


def _remove_unless_used(path: Path) -> bool:
    try:
        with open(path, "rb+") as file:  # NFS locks exclusively only what can be written
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
    except OSError:  # in use, gone, or another user's
        return False
    return True


def file_name(url: str) -> str:
    """The file name for a url: its hash makes it unique, the url's end readable."""
    end = re.sub(r"[^A-Za-z0-9]+", "-", url)[-40:].strip("-")
    digest = hashlib.sha256(url.encode(errors="surrogateescape")).hexdigest()
    return f"{digest[:20]}-{end}"
