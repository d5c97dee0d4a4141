"""A csv row by row: its separator found, and a malformed row costs that row only."""

import csv
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aclip.data.convert.entries import Note, Rejected
from aclip.data.convert.sources.text_files import TextLines
from aclip.errors import ConfigError

SEPARATORS = {"comma": ",", "tab": "\t", "semicolon": ";", "pipe": "|"}
SUFFIXES = {".csv": ",", ".tsv": "\t", ".txt": "\t"}
"""What is tried first."""
MAX_FIELD = 16 * 2**20
"""Characters of a field; csv's own limit is shorter than some web pages' captions."""
MAX_LINES = 1000
"""Lines of a quoted row; after so many, the quote is taken for one that never closes."""
OPEN_QUOTE = "unexpected end of data"  # what csv says of a quote that is not closed
SPREADSHEET = "sep="
"""Begins a first line with which spreadsheets name the separator."""
SHOWN = 80


class CsvTable:
    """A csv, whose first line names its columns.

    Args:
        path: the file.
        kind: a key of SUFFIXES.
        wanted: columns by which the separator is recognised.
        has_quotes: fields may be quoted.
        separator: the one to use, a character or a key of SEPARATORS; None to find it.

    Attributes:
        names: of the columns.
        how: how they were separated, in words.

    Raises:
        ConfigError: the separator is none, or the file can't be read.
    """

    def __init__(
        self, path: Path, kind: str, wanted: list[str], has_quotes: bool, separator: str | None
    ):
        csv.field_size_limit(MAX_FIELD)
        self._path = path
        self._wanted = wanted
        self._quoting = csv.QUOTE_MINIMAL if has_quotes else csv.QUOTE_NONE
        self._skips_spaces = False
        lines = iter(TextLines(path))
        header = next(lines, "")
        self._header_lines = 1
        tried = [SUFFIXES[kind], *SEPARATORS.values()]
        if header.lower().startswith(SPREADSHEET) and len(header.strip()) <= len(SPREADSHEET) + 1:
            tried = [_separator(header[len(SPREADSHEET) :].strip("\r\n"))]
            header = next(lines, "")
            self._header_lines = 2
        if separator is not None:
            tried = [_separator(separator)]
        parsed = {each: self._parse([header], each) for each in dict.fromkeys(tried)}
        found = {each: names for each, names in parsed.items() if isinstance(names, list)}
        if not found:
            raise ConfigError(f"{path} line 1 is malformed: {header[:SHOWN]!r}; check the file")
        self._separator = self._choose(found)
        self._skips_spaces = any(name.startswith(" ") for name in found[self._separator][1:])
        self.names = [name.strip() for name in found[self._separator]]
        shown = {character: name for name, character in SEPARATORS.items()}
        self.how = f" (separator: {shown.get(self._separator, self._separator)})"

    def rows(self, wanted: list[str]) -> Iterator[tuple[str, list[Any]] | Rejected | Note]:
        places = [self.names.index(name) for name in wanted]
        width = len(self.names)
        lines = TextLines(self._path)
        for number, values in self._records(lines, width):
            yield from lines.take_notes()
            where = f"line {number}"
            if isinstance(values, str):
                yield Rejected(where, "malformed_row", values)
                continue
            is_last_text = places[0] != width - 1 and width - 1 in places
            if len(values) > width and self._quoting == csv.QUOTE_NONE and is_last_text:
                rest = self._separator.join(values[width - 1 :])
                yield Note(where, "separator_in_caption", rest[:SHOWN])
                values = [*values[: width - 1], rest]
            if len(values) == width:
                yield where, [values[place] for place in places]
            elif values:
                shown = self._separator.join(values)[:SHOWN]
                why = f"{len(values)} columns, not {width}: {shown}"
                yield Rejected(where, "malformed_row", why)
        yield from lines.take_notes()

    def _choose(self, found: dict[str, list[str]]) -> str:
        """The separator that gives the wanted columns, else the most columns."""

        def merit(separator: str) -> tuple[int, int]:
            names = {name.strip() for name in found[separator]}
            return len(names.intersection(self._wanted)), len(names)

        return max(found, key=merit)  # the first of equal ones

    def _records(self, lines: TextLines, width: int) -> Iterator[tuple[int, list[str] | str]]:
        """Yields (number of its first line, fields or why they can't be read) of each row.

        A row goes on over the next lines while a quote is open. Where that gives no row of the
        table's width, its first line alone is given up: the next row begins in the line behind.
        """
        source = iter(lines)
        ahead: deque[str] = deque()
        number = 0

        def line_at(index: int) -> str | None:
            while len(ahead) <= index:
                line = next(source, None)
                if line is None:
                    return None
                ahead.append(line)
            return ahead[index]

        while (line := line_at(0)) is not None:
            number += 1
            if number <= self._header_lines:
                ahead.popleft()
                continue
            taken = [line]
            fields = self._parse(taken, self._separator)
            while fields == OPEN_QUOTE and len(taken) < MAX_LINES:
                line = line_at(len(taken))
                if line is None:
                    break
                taken.append(line)
                if '"' in line:
                    fields = self._parse(taken, self._separator)
            is_whole = isinstance(fields, list) and len(fields) == width
            if isinstance(fields, str) or (len(taken) > 1 and not is_whole):
                is_open = len(taken) > 1 or fields == OPEN_QUOTE
                why = "a quote opens and does not close as it should" if is_open else fields
                yield number, f"{why}: {taken[0].strip()[:SHOWN]}"
                taken = taken[:1]
            else:
                yield number, fields
            for _ in taken:
                ahead.popleft()
            number += len(taken) - 1

    def _parse(self, lines: list[str], separator: str) -> list[str] | str:
        """The fields of one row, or why they can't be read."""
        reader = csv.reader(
            lines,
            delimiter=separator,
            quoting=self._quoting,
            strict=True,
            skipinitialspace=self._skips_spaces,
        )
        try:
            return next(reader, [])
        except csv.Error as error:
            return str(error)


def _separator(given: str) -> str:
    character = SEPARATORS.get(given.lower(), "\t" if given == "\\t" else given)
    if len(character) != 1 or character in '"\r\n':
        raise ConfigError(
            f"--separator is {given!r}; give one character, or {', '.join(SEPARATORS)}"
        )
    return character
