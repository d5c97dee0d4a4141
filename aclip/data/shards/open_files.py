"""A bounded number of open files, however many shards a process holds samples of."""

import io
import os
from collections import OrderedDict
from collections.abc import Callable

MAX_OPEN_FILES = 256


class OpenFile:
    """A file that closes when nobody refers to it any more.

    Attributes:
        descriptor: for os.pread.
        size: in bytes.
        mtime_ns: time of the last change.
    """

    def __init__(self, file: io.BufferedReader):
        self._file = file
        self.descriptor = file.fileno()
        status = os.fstat(self.descriptor)
        self.size, self.mtime_ns = status.st_size, status.st_mtime_ns

    def __del__(self):
        self._file.close()


class OpenFiles:
    """Open files by key; of more than `limit` the least recently used are let go.

    Threads share it without a lock, which a fork or the garbage collector could find held: every
    step is one operation on the dictionary. A thread that reads a file refers to it, so the file
    stays open until then, though another thread lets it go. At worst two threads open it twice.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self._files: OrderedDict[int, OpenFile] = OrderedDict()

    def use(self, key: int, open_again: Callable[[], OpenFile]) -> OpenFile:
        """The file of `key`, opened if it is not open; raises what `open_again` raises."""
        file = self._files.pop(key, None) or open_again()
        self._files[key] = file
        while len(self._files) > self.limit:
            self._files.popitem(last=False)
        return file

    def let_go(self, key: int) -> None:
        self._files.pop(key, None)


OPEN_FILES = OpenFiles(MAX_OPEN_FILES)
"""The shards that this process has open. A remote one that is let go may leave the cache, too; it
is fetched again when it is read again."""
