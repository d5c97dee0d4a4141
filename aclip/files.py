"""How aclip writes: a file or folder appears whole or not at all, and a failure is one sentence."""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from aclip.errors import ConfigError, NotWritten

PREFIXES = ("timm:", "local-dir:")
"""Words in front of a path that say how to read what is there."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an OSError of the block into NotWritten; for what a library writes by itself.

    So too an error of safetensors that an OSError has caused.

    An OSError that names a file outside `path` and its folder comes from reading and passes.
    """
    try:
        yield
    except OSError as error:
        named = error.filename
        if named is not None and not _belongs(Path(os.fsdecode(named)), path):
            raise
        raise NotWritten(not_written(path, error)) from error
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        cause = OSError(int(number[1]), os.strerror(int(number[1])))
        raise NotWritten(not_written(path, cause)) from error


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """Yields a free path beside `path`; the file written there gets its name once it is whole.

    Makes the folder if need be. A reader, also after a loss of power, sees the whole file or the
    one before. If the block raises, nothing is left; a killed process leaves what
    `remove_leftovers` removes.

    Raises:
        NotWritten: the disk is full, or the folder can't be written.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.unlink(missing_ok=True)  # may be left of a killed process with this number
            yield temporary
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)
    finally:
        _remove_file(temporary)


@contextmanager
def appearing_folder(path: Path) -> Iterator[Path]:
    """Yields a new folder beside `path`, which gets that name once the block has filled it.

    `path` may exist as an empty folder. If the block raises, nothing is left.

    Raises:
        NotWritten: the disk is full, the place can't be written, or `path` was filled meanwhile.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with writing(path):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            yield temporary
            for entry in [*temporary.rglob("*"), temporary]:
                share(entry)
                sync(entry)
            os.rename(temporary, path)
            sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Removes what killed processes left in a folder into which no other process writes now."""
    for temporary in folder.glob("*.[0-9]*.tmp"):
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes | str) -> None:
    """Writes a file, and its folder if need be; a reader sees the whole file or the one before.

    Raises:
        NotWritten: see `appearing`.
    """
    with appearing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def append(path: Path, content: bytes) -> None:
    """Adds to the end of a file; a killed process leaves all of it, or its beginning.

    Raises:
        NotWritten: see `appearing`; a beginning that got into the file is cut off again.
    """
    with writing(path), open(path, "ab", buffering=0) as file:
        before = file.seek(0, os.SEEK_END)
        try:
            if file.write(content) != len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            file.truncate(before)
            raise


class PlacedWriter:
    """Writes at places of a file that is there, as other processes may at other places.

    Raises:
        NotWritten: from every method, see `appearing`.
    """

    def __init__(self, path: Path):
        self._path = path
        with writing(path):
            # Not for reading too: a network file system would fetch each page before it changes.
            self._descriptor = os.open(path, os.O_WRONLY)

    def write(self, content: bytes, place: int) -> None:
        """Writes at so many bytes from the beginning."""
        with writing(self._path):
            if os.pwrite(self._descriptor, content, place) != len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def sync(self) -> None:
        """Makes what was written last through a loss of power, for processes elsewhere too."""
        with writing(self._path):
            os.fsync(self._descriptor)

    def close(self) -> None:
        with writing(self._path):
            os.close(self._descriptor)


def resize(path: Path, size: int) -> None:
    """Cuts a file off, or adds zeros at its end that take no room, so that it has `size` bytes.

    Raises:
        NotWritten: see `appearing`.
    """
    with writing(path):
        os.truncate(path, size)


def make_folder(path: Path) -> None:
    """Makes a folder and those above it, if need be.

    Raises:
        NotWritten: that is not possible.
    """
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)


def not_written(path: Path, error: OSError) -> str:
    """The sentence about a file or folder that could not be written."""
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        advice = "make room there, or write to another disk"
    else:
        advice = "make it writable, or give another place"
    return f"{path} can't be written ({reason}); {advice}"


def share(path: Path) -> None:
    """Lets who may read the folder read this file of it: what safetensors writes, its owner alone
    may read."""
    if path.is_file():
        path.chmod(path.parent.stat().st_mode & 0o666)


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
    probe = folder / f".writable-{os.environ.get('RANK', '0')}-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        _remove_file(probe)
        raise ConfigError(
            f"{option} is {folder}, which can't be written ({error.strerror}); give another folder"
        ) from None


def expand_home(path: str, field: str) -> str:
    """A path that a user gave, with `~` or `~user` in front replaced by that home folder.

    This also works behind `timm:` and `local-dir:`. What begins otherwise, such as an address or a
    command, stays as it is.

    Args:
        field: the option or the recipe's key that gave the path, for the message.

    Raises:
        ConfigError: no such home folder is known, and there is no file of that very name.
    """
    prefix = next((each for each in PREFIXES if path.startswith(each)), "")
    rest = path.removeprefix(prefix)
    expanded = os.path.expanduser(rest)
    if rest.startswith("~") and expanded == rest and not os.path.lexists(rest):
        raise ConfigError(
            f"{field} is {path}, but no such home folder is known; write the folder out, or "
            f"{prefix}./{rest} for a name that begins with ~"
        )
    return prefix + expanded


def cache_folder() -> Path:
    """The folder of what aclip can make again: ACLIP_CACHE, or ~/.cache/aclip.

    Raises:
        ConfigError: ACLIP_CACHE is not set, and this user has no home.
    """
    try:
        return Path(os.environ.get("ACLIP_CACHE") or "~/.cache/aclip").expanduser()
    except RuntimeError:
        raise ConfigError(
            "ACLIP_CACHE is not set, and this user has no home; set it to a folder for what aclip "
            "keeps, such as ACLIP_CACHE=/tmp/aclip"
        ) from None


def _belongs(named: Path, path: Path) -> bool:
    """Whether an error that names a file is about writing `path`."""
    return named in path.parents or named.is_relative_to(path.parent)


def _remove_file(path: Path) -> None:
    # A folder that has just refused to be written is the error to report, not this one.
    with suppress(OSError):
        path.unlink(missing_ok=True)
