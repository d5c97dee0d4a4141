"""Writing so that a reader, or a loss of power, never finds half a file."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from aclip.errors import ConfigError


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """Yields a free path beside `path`; the file written there gets its name once it is whole.

    A reader, also after a loss of power, sees the whole file or the one before. If the block
    raises, nothing is left; a killed process leaves what `remove_leftovers` removes.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)  # may be left of a killed process with the same number
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Removes what killed processes left in a folder into which no other process writes now."""
    for temporary in folder.glob("*.[0-9]*.tmp"):
        temporary.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file, and its folder if need be; a reader sees the whole file or the one before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with appearing(path) as temporary:
        temporary.write_bytes(content)


def sync(path: Path) -> None:
    """Makes a file's bytes, or the names in a folder, last through a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_writable(folder: Path, option: str) -> None:
    """Makes a folder if need be and tries to write into it; every rank tries a file of its own.

    Args:
        option: gave the folder, such as --output.

    Raises:
        ConfigError: it can't be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{os.environ.get('RANK', '0')}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"{option} is {folder}, which can't be written ({error.strerror}); give another folder"
        ) from None


def cache_folder() -> Path:
    """The folder of what aclip can make again: ACLIP_CACHE, or ~/.cache/aclip."""
    return Path(os.environ.get("ACLIP_CACHE") or Path.home() / ".cache" / "aclip")
