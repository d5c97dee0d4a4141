"""Text metadata line by line, plain, .bz2 or .gz, and checks of paths on the command line."""

import bz2
import codecs
import gzip
import io
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from aclip.data.captions import (
    DAMAGED_TEXT,
    DECODED_AS_UTF16,
    SEEN_FOR_NULS,
    WIDE_MARKS,
    decode_text,
    wide_encoding,
)
from aclip.data.convert.entries import Entry, Note, Rejected
from aclip.errors import ConfigError

LINES_A_REPORT = 4096
SHOWN = 100
"""Characters of a line in a note about it."""


class TextLines:
    """The lines of a file, which end with a newline, and notes about what was guessed in them.

    The encoding is UTF-8, UTF-16 or UTF-32 by the byte order mark; without one, a line that is no
    UTF-8 is Windows-1252.

    Args:
        path: read as .bz2 or .gz if it is called so.
        progress: is called now and then with the position in the file, in bytes on disk.

    Attributes:
        number: of the line that was given last, from 1.
        notes: about the lines given; the owner takes them away.
    """

    def __init__(self, path: Path, progress: Callable[[int], None] | None = None):
        self.path = path
        self.number = 0
        self.notes: list[Note] = []
        self._progress = progress

    def __iter__(self) -> Iterator[str]:
        """
        Raises:
            ConfigError: the file can't be read or is damaged.
        """
        self.number = 0
        try:
            with open(self.path, "rb") as raw:
                suffix = self.path.suffix.lower()
                opened = {".bz2": bz2.open, ".gz": gzip.open}.get(suffix, lambda file: file)(raw)
                for line, kind in _decoded(opened):
                    if self._progress is not None and self.number % LINES_A_REPORT == 0:
                        self._progress(raw.tell())
                    self.number += 1
                    if kind is not None:
                        self.notes.append(Note(f"line {self.number}", kind, line.strip()[:SHOWN]))
                    yield line
        except (OSError, EOFError, zlib.error) as error:
            raise unreadable(self.path, error) from None

    def noted(
        self, entries: Iterable[Entry | Rejected | Note]
    ) -> Iterator[Entry | Rejected | Note]:
        """Entries that are made of the lines, and the notes about these among them."""
        for entry in entries:
            yield from self.take_notes()
            yield entry
        yield from self.take_notes()

    def take_notes(self) -> list[Note]:
        """The notes since the last call."""
        notes, self.notes = self.notes, []
        return notes


def _decoded(file: io.BufferedReader) -> Iterator[tuple[str, str | None]]:
    """Yields (line, what is to be noted about its encoding)."""
    head = file.peek(SEEN_FOR_NULS)[:SEEN_FOR_NULS]
    encoding = wide_encoding(head)
    if encoding is not None:
        guessed = None if encoding in WIDE_MARKS.values() else DECODED_AS_UTF16
        for line in io.TextIOWrapper(file, encoding, errors="replace", newline="\n"):
            yield line, DAMAGED_TEXT if "\ufffd" in line else guessed
        return
    if head.startswith(codecs.BOM_UTF8):
        file.read(len(codecs.BOM_UTF8))
    for line in file:
        yield decode_text(line, may_be_wide=False)


def unreadable(path: Path, error: Exception) -> ConfigError:
    reason = getattr(error, "strerror", None) or error
    return ConfigError(f"{path} can't be read ({reason}); check the file")


def existing_file(path: str, name: str) -> Path:
    """The path of a file that argument `name` gives.

    Raises:
        ConfigError: there is none.
    """
    if Path(path).is_dir():
        raise ConfigError(f"{name} is {path}, which is a folder; give a file in it")
    if not Path(path).is_file():
        raise ConfigError(f"{name} is {path}, but there is no such file; check the path")
    return Path(path)


def existing_folder(path: str, name: str) -> Path:
    """The path of a folder that argument `name` gives.

    Raises:
        ConfigError: there is none.
    """
    if Path(path).is_file():
        raise ConfigError(f"{name} is {path}, which is a file; give the folder")
    if not Path(path).is_dir():
        raise ConfigError(f"{name} is {path}, but there is no such folder; check the path")
    return Path(path)
