"""A folder of fetched shards with a size limit, shared by all processes of a machine.

A file appears complete or not at all. The least recently opened files are removed first, but never
one that a process reads. Processes agree through locks on files, which end with their holder.
"""

import fcntl
import hashlib
import io
import logging
import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from filelock import FileLock

logger = logging.getLogger(__name__)

SUFFIX = ".shard"
PARTIAL = ".partial"


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

    def open(self, url: str, fetch: Callable[[Path], None]) -> io.BufferedReader:
        """Opens the shard of `url`; if it is absent, `fetch(path)` writes it, in one process.

        Raises:
            OSError: the folder can't be written, or `fetch` raised it.
        """
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
        with FileLock(self.folder / "evict.lock"):
            partial.touch()
            in_use = _open_locked(partial)
        try:
            fetch(partial)
            file = _open_locked(partial)  # again, since fetch may have replaced the file
            os.replace(partial, path)
            return file
        finally:
            in_use.close()
            partial.unlink(missing_ok=True)

    def _evict(self) -> None:
        """Removes shards that nobody reads, oldest first, until the rest is within the limit."""
        with FileLock(self.folder / "evict.lock"):
            files = sorted(self._files(), key=lambda entry: entry[1].st_mtime_ns)
            excess = sum(status.st_size for _, status in files) - self.limit
            for path, status in files:
                is_left_over = path.name.endswith(PARTIAL)
                if (excess > 0 or is_left_over) and _remove_unless_used(path):
                    excess -= status.st_size
        if excess > 0 and self.folder not in self._warned:
            self._warned.add(self.folder)
            logger.warning(
                "the shards that are read at once fill %s beyond its limit of %.1f GB, by %.1f GB; "
                "raise data.cache_gb, or lower data.lanes",
                self.folder,
                self.limit / 1e9,
                excess / 1e9,
            )

    def _files(self) -> list[tuple[Path, os.stat_result]]:
        files = []
        for path in self.folder.iterdir():
            if path.name.endswith((SUFFIX, PARTIAL)):
                try:
                    files.append((path, path.stat()))
                except FileNotFoundError:  # renamed or removed meanwhile
                    continue
        return files


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
