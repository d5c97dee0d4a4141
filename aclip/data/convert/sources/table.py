"""A csv, tsv, jsonl or parquet with the path of an image and its captions in each row."""

import ast
import json
import math
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from aclip.data.captions import decode_text
from aclip.data.convert.entries import Entry, Note, Rejected, Source, make_key
from aclip.data.convert.sources.csv_rows import SUFFIXES as CSV_SUFFIXES
from aclip.data.convert.sources.csv_rows import CsvTable
from aclip.data.convert.sources.parquet_rows import ParquetTable
from aclip.data.convert.sources.text_files import TextLines, existing_file, existing_folder
from aclip.errors import ConfigError

JSON_SUFFIXES = (".jsonl", ".ndjson")
ROWS_SEEN_FOR_NAMES = 100
NAMES_SHOWN = 20
LIST_ERRORS = (ValueError, SyntaxError, MemoryError, RecursionError)
LEFT_OUT = "no_text_in_row"

Row = tuple[str, list[Any]]
"""Where the row is, such as `line 7`, and its values in the wanted columns."""


class Table(Protocol):
    """What a file of one format offers.

    Attributes:
        names: of its columns.
        how: how the names were read, for a message about missing ones.
    """

    names: list[str]
    how: str

    def rows(self, wanted: list[str]) -> Iterator[Row | Rejected | Note]:
        """The values of some columns."""


def table_source(
    table: str,
    images: str | None,
    image_column: str,
    caption_columns: list[str],
    has_quotes: bool = True,
    separator: str | None = None,
) -> Source:
    """The rows of a table; the key of a sample is its image's path without suffix.

    Several rows of one image are several captions, and so are the items of a list in a cell.

    Args:
        table: .csv, .tsv or .txt (also .bz2 or .gz of it) with column names in its first line,
            .jsonl, or .parquet.
        images: the folder that paths are relative to; None for the table's.
        image_column, caption_columns: names of the columns.
        has_quotes: a csv's fields may be quoted; else a quote is a character as any other.
        separator: what separates a csv's fields; None to find it from the header.

    Raises:
        ConfigError: no such file, folder or column, a column is of a type that holds no paths or no
            text, or pyarrow is missing for a parquet; while iterating, the table is damaged.
    """
    path = existing_file(table, "TABLE")
    folder = path.parent if images is None else existing_folder(images, "--images")
    wanted = [image_column, *caption_columns]
    opened = _open(path, wanted, has_quotes, separator)
    for option, column in zip(
        ["--image-column"] + ["--caption-column"] * len(caption_columns), wanted, strict=True
    ):
        if column not in opened.names:
            raise ConfigError(
                f"{option} is {column}, but {path}{opened.how} has {_listed(opened.names)}; name "
                "one of them"
            )
    if isinstance(opened, ParquetTable):
        opened.check_types(image_column, caption_columns)

    def entries() -> Iterator[Entry | Rejected | Note]:
        for row in opened.rows(wanted):
            if isinstance(row, Rejected | Note):
                yield row
            else:
                yield from _entries(*row)

    return Source(folder, (path,), entries)


def _open(path: Path, wanted: list[str], has_quotes: bool, separator: str | None) -> Table:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    kind = next((suffix for suffix in reversed(suffixes) if suffix not in (".bz2", ".gz")), "")
    if kind in CSV_SUFFIXES:
        return CsvTable(path, kind, wanted, has_quotes, separator)
    if separator is not None or not has_quotes:
        option = "--separator" if separator is not None else "--no-quotes"
        raise ConfigError(f"{option} is for {', '.join(CSV_SUFFIXES)}, but TABLE is {path}")
    if kind == ".parquet":
        return ParquetTable(path)
    if kind in JSON_SUFFIXES:
        return _JsonTable(path)
    known = ", ".join((*CSV_SUFFIXES, *JSON_SUFFIXES))
    raise ConfigError(f"TABLE is {path}, which is no {known} or .parquet; convert it")


def _entries(where: str, values: list[Any]) -> Iterator[Entry | Rejected | Note]:
    image, *cells = values
    if isinstance(image, int) and not isinstance(image, bool):
        image = str(image)
    if image is None or image == "" or _is_nan(image):
        yield Rejected(where, "no_image", "no path in the row")
        return
    if not isinstance(image, str):
        yield Rejected(where, "malformed_row", f"the path is {str(image)[:80]}, which is no text")
        return
    captions: list[str] = []
    notes: set[str] = set()
    for cell in cells:
        captions += _texts(cell, notes)
    for kind in sorted(notes):
        yield Note(where, kind, str(cells)[:100])
    yield Entry(make_key(os.path.splitext(image)[0]), image, tuple(captions))


def _texts(cell: Any, notes: set[str]) -> list[str]:
    """The captions in a cell; adds what is to be noted about it."""
    if cell is None or _is_nan(cell):
        return []
    if isinstance(cell, bytes):
        cell, note = decode_text(cell)
        notes |= {note} - {None}
    if isinstance(cell, str):
        items = _list_in(cell)
        return [cell] if items is None else items
    if isinstance(cell, int | float):
        return [str(cell)]
    if not isinstance(cell, list):
        notes.add(LEFT_OUT)
        return []
    found = []
    for item in cell:
        if isinstance(item, str | bytes):
            found += _texts(item, notes)
        else:
            notes.add(LEFT_OUT)
    return found


def _list_in(text: str) -> list[str] | None:
    """The texts of a list that is written as JSON or as Python writes it, as in some csv files; or
    None where that is no list of texts."""
    if not (text.startswith("[") and text.endswith("]")):
        return None
    for read in (json.loads, ast.literal_eval):
        try:
            items = read(text)
        except LIST_ERRORS:
            continue
        if isinstance(items, list) and items and all(isinstance(item, str) for item in items):
            return items
    return None


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _listed(names: list[str]) -> str:
    shown = [name[:80] for name in names[:NAMES_SHOWN]]
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return (", ".join(shown) + more) or "no columns"


class _JsonTable:
    """An object a line."""

    how = ""

    def __init__(self, path: Path):
        self._path = path
        names: dict[str, None] = {}
        for line in islice(TextLines(path), ROWS_SEEN_FOR_NAMES):
            names |= dict.fromkeys(_object(line) or ())
        self.names = list(names)

    def rows(self, wanted: list[str]) -> Iterator[Row | Rejected | Note]:
        lines = TextLines(self._path)
        for line in lines:
            where = f"line {lines.number}"
            yield from lines.take_notes()
            values = _object(line)
            if values is not None:
                yield where, [values.get(name) for name in wanted]
            elif line.strip():
                yield Rejected(where, "malformed_row", f"no JSON object: {line.strip()[:80]}")


def _object(line: str) -> dict[str, Any] | None:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None
