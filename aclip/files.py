"""Writing so that a reader, or a loss of power, never finds half a file."""

import os
from pathlib import Path

from aclip.errors import ConfigError


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file, and its folder if need be; a reader sees the whole file or the one before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Makes a file's bytes, or the names in a folder, last through a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_writable(folder: Path) -> None:
    """Makes the folder of `--output` if need be, and tries to write into it; one try for each rank.

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
            f"--output is {folder}, which can't be written ({error.strerror}); give another folder"
        ) from None


def cache_folder() -> Path:
    """Where aclip keeps what it can make again: ACLIP_CACHE, or ~/.cache/aclip."""
    return Path(os.environ.get("ACLIP_CACHE") or Path.home() / ".cache" / "aclip")
