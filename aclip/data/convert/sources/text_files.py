"""Text metadata line by line, plain, .bz2 or .gz, and checks of paths on the command line."""

import bz2
import gzip
import io
from collections.abc import Callable, Iterator
from pathlib import Path

from aclip.errors import ConfigError

LINES_A_REPORT = 4096


def iterate_lines(path: Path, progress: Callable[[int], None] | None = None) -> Iterator[str]:
    """Yields the lines, which end with a newline; bytes that are no UTF-8 come as U+FFFD.

    Args:
        path: read as .bz2 or .gz if it is called so.
        progress: is called now and then with the position in the file, in bytes on disk.

    Raises:
        ConfigError: the file can't be read or is damaged.
    """
    try:
        with open(path, "rb") as raw:
            opened = {".bz2": bz2.open, ".gz": gzip.open}.get(path.suffix, lambda file: file)(raw)
            text = io.TextIOWrapper(opened, "utf-8-sig", errors="replace", newline="\n")
            for number, line in enumerate(text):
                if progress is not None and number % LINES_A_REPORT == 0:
                    progress(raw.tell())
                yield line
    except (OSError, EOFError) as error:
        raise unreadable(path, error) from None


def unreadable(path: Path, error: Exception) -> ConfigError:
    reason = getattr(error, "strerror", None) or error
    return ConfigError(f"{path} can't be read ({reason}); check the file")


def existing_file(path: str, name: str) -> Path:
    """The path of a file that argument `name` gives.

    Raises:
        ConfigError: there is none.
    """
    if not Path(path).is_file():
        raise ConfigError(f"{name} is {path}, but there is no such file; check the path")
    return Path(path)


def existing_folder(path: str, name: str) -> Path:
    """The path of a folder that argument `name` gives.

    Raises:
        ConfigError: there is none.
    """
    if not Path(path).is_dir():
        raise ConfigError(f"{name} is {path}, but there is no such folder; check the path")
    return Path(path)
