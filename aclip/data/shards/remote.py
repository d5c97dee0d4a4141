"""Shards that are no local files: `pipe:` commands and every address that fsspec understands.

A shard is fetched whole, with retries, into a cache folder that all processes of a machine share,
and read there. So an interrupted transfer is never taken for a short shard, and passing over
samples costs no transfer.
"""

import logging
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from select import select

import fsspec

from aclip.data.shards.cache import FULL, CacheFull, ShardCache
from aclip.errors import ConfigError, NotWritten

logger = logging.getLogger(__name__)

FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0
"""Seconds before the first retry, and the most before a later one. They double from try to try, and
each wait is drawn between half and one and a half of that."""
STALL = 60.0
"""Seconds without a byte after which a transfer has failed."""
CHUNK = 2**20
PREFETCH_THREADS = 2
FINAL_ERRORS = (FileNotFoundError, PermissionError)
"""Errors that another try would not change."""


def is_remote(url: str) -> bool:
    return url.startswith("pipe:") or "://" in url


def check_protocol(url: str, field: str) -> None:
    """Raises ConfigError where an address's protocol is unknown or its package not installed."""
    if url.startswith("pipe:"):
        return
    protocol = fsspec.utils.get_protocol(url.split("::")[-1])
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        raise ConfigError(
            f"{field} holds {url}, but a package that reads {protocol} is missing ({error}); "
            f"pip install 'fsspec[{protocol}]'"
        ) from None
    except ValueError:
        raise ConfigError(
            f"{field} holds {url}, but {protocol} is not a protocol that fsspec knows; give a "
            "path, pipe:COMMAND or an address such as https://, s3:// or gs://"
        ) from None


@dataclass(frozen=True)
class RemoteShards:
    """How shards are fetched.

    Attributes:
        folder: the cache's folder.
        limit: the number of bytes that the cache may hold.
        retries: number of further tries after a transfer that failed.
    """

    folder: Path
    limit: int
    retries: int

    def open(self, url: str):
        """Opens a shard for reading in binary, fetched first if it is not in the cache.

        Raises:
            OSError: it can't be fetched, after the last try. The message says why.
            NotWritten: the cache folder can't be written, or is still full after the last try.
        """
        for tried in range(self.retries + 1):
            try:
                return self._cache.open(
                    url, lambda path: self._with_retries(url, lambda: _fetch(url, path))
                )
            except CacheFull as error:
                if tried == self.retries:
                    raise
                _wait(url, tried, error)  # what others fetch or read may be in use no longer

    def check(self) -> None:
        """Raises ConfigError where the cache folder can't be used."""
        self._cache.check()

    @property
    def _cache(self) -> ShardCache:
        return ShardCache(self.folder, self.limit)

    def read_text(self, url: str) -> str | None:
        """A small text file beside the shards; None if there is none, or it may not be read.

        Raises:
            OSError: it can't be fetched, after the last try.
        """
        try:
            return self._with_retries(url, lambda: _read(url)).decode()
        except FINAL_ERRORS:
            return None

    def prefetch(self, url: str) -> None:
        """Begins to fetch a shard in the background. If it fails, `open` tries again and raises."""
        once = replace(self, retries=0)

        def run() -> None:
            with _prefetching, suppress(OSError, NotWritten):
                once.open(url).close()

        if not self._cache.holds(url):
            threading.Thread(target=run, daemon=True).start()

    def _with_retries(self, url: str, attempt: Callable):
        for tried in range(self.retries + 1):
            try:
                return attempt()
            except FINAL_ERRORS:
                raise
            except OSError as error:
                if error.errno in FULL:
                    raise
                if tried == self.retries:
                    tries = f"{tried + 1} tries" if tried else "1 try"
                    raise OSError(f"{error} ({tries})") from None
                _wait(url, tried, error)


def _wait(url: str, tried: int, error: Exception) -> None:
    wait = min(LONGEST_WAIT, FIRST_WAIT * 2**tried) * _jitter.uniform(0.5, 1.5)
    logger.warning("%s: %s; next try in %.1f s", url, error, wait)
    time.sleep(wait)


_prefetching = threading.BoundedSemaphore(PREFETCH_THREADS)
# Ranks that fail together should not come back together, nor may they touch random's global state.
_jitter = random.Random()


def _fetch(url: str, path: Path) -> None:
    """Writes a shard to `path`. Raises OSError."""
    if url.startswith("pipe:"):
        _run_command(url.removeprefix("pipe:"), path)
    else:
        _through_fsspec(url, lambda files, name: files.get_file(name, str(path)))


def check_readable(url: str) -> None:
    """Reads a remote shard's first bytes; what follows `pipe:` is not run. Raises OSError."""
    if not url.startswith("pipe:"):
        _through_fsspec(url, lambda files, name: files.cat_file(name, start=0, end=512))


def _read(url: str) -> bytes:
    return _through_fsspec(url, lambda files, name: files.cat_file(name))


def _through_fsspec(url: str, use: Callable):
    try:
        return use(*fsspec.core.url_to_fs(url, **_options(url)))
    except FileNotFoundError:
        raise FileNotFoundError("there is no such file") from None
    except PermissionError as error:
        raise PermissionError(_one_line(f"access is denied, {error}")) from None
    except Exception as error:  # each protocol's client raises classes of its own
        cause: BaseException | None = error
        while cause is not None:  # a full disk, whatever the client makes of it
            if isinstance(cause, OSError) and cause.errno in FULL:
                raise cause from None
            cause = cause.__cause__ or cause.__context__
        raise OSError(_one_line(f"{type(error).__name__}: {error}")) from None


def _options(url: str) -> dict:
    """Time limits for HTTP: none on a whole transfer, which aiohttp ends after 5 minutes."""
    if not url.startswith(("http://", "https://")):
        return {}
    import aiohttp  # fsspec reads HTTP through it; the user's to install

    protocol = url.split(":")[0]
    own = fsspec.config.conf.get(protocol, {}).get("client_kwargs", {})
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=STALL, sock_read=STALL)
    return {"client_kwargs": {"timeout": timeout, **own}}


def _run_command(command: str, path: Path) -> None:
    """Writes what a shell command prints to `path`."""
    with open(path, "wb") as file:
        process = subprocess.Popen(
            # bash where there is one, so that any part of a pipeline that fails is noticed.
            ["bash", "-o", "pipefail", "-c", command] if shutil.which("bash") else command,
            shell=not shutil.which("bash"),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            start_new_session=True,  # so that all of a pipeline can be ended
        )
        try:
            while select([process.stdout], [], [], STALL)[0]:
                chunk = os.read(process.stdout.fileno(), CHUNK)
                if not chunk:
                    break
                file.write(chunk)
            else:
                raise OSError(f"the command wrote nothing for {STALL:g} s")
            status = process.wait(STALL)
        except subprocess.TimeoutExpired:
            raise OSError(f"the command closed its output but did not end in {STALL:g} s") from None
        finally:
            process.stdout.close()
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if status:
        raise OSError(f"the command ended with status {status}")


def _one_line(text: str) -> str:
    return " ".join(text.split())
