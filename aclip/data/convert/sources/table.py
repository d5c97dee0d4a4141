"""A csv, tsv or parquet with the path of an image and its captions in each row."""

import csv
import os
from collections.abc import Iterator
from pathlib import Path

from aclip.data.convert.entries import Entry, Rejected, Source, make_key
from aclip.data.convert.sources.text_files import (
    existing_file,
    existing_folder,
    iterate_lines,
    unreadable,
)
from aclip.errors import ConfigError

DELIMITERS = {".csv": ",", ".tsv": "\t"}
MAX_FIELD = 16 * 2**20
"""Characters of a field; csv's own limit is shorter than some web pages' captions."""
ROWS_A_BATCH = 1024


def table_source(
    table: str,
    images: str | None,
    image_column: str,
    caption_columns: list[str],
    has_quotes: bool = True,
) -> Source:
    """The rows of a table; the key of a sample is its image's path without suffix.

    Args:
        table: .csv or .tsv (also .bz2 or .gz of it) with column names in its first line, or
            .parquet.
        images: the folder that paths are relative to; None for the table's.
        image_column, caption_columns: names of the columns.
        has_quotes: a csv's fields may be quoted; else a quote is a character as any other.

    Raises:
        ConfigError: no such file, folder or column, or pyarrow is missing for a parquet; while
            iterating, the table is damaged.
    """
    path = existing_file(table, "TABLE")
    folder = path.parent if images is None else existing_folder(images, "--images")
    suffixes = [suffix for suffix in path.suffixes if suffix not in (".bz2", ".gz")]
    kind = suffixes[-1] if suffixes else ""
    wanted = [image_column, *caption_columns]
    if kind == ".parquet":
        rows = _parquet_rows
        names = _parquet(path).schema_arrow.names
    elif kind in DELIMITERS:
        options = {"delimiter": DELIMITERS[kind], "strict": True}
        if not has_quotes:
            options["quoting"] = csv.QUOTE_NONE

        def rows(path, wanted):
            return _text_rows(path, wanted, options)

        names = _text_names(path, options)
    else:
        raise ConfigError(f"TABLE is {path}, which is no .csv, .tsv or .parquet; convert it")
    for option, column in zip(
        ["--image-column"] + ["--caption-column"] * len(caption_columns), wanted, strict=True
    ):
        if column not in names:
            raise ConfigError(
                f"{option} is {column}, but {path} has {', '.join(names) or 'no columns'}; name "
                "one of them"
            )

    def entries() -> Iterator[Entry | Rejected]:
        for number, values in enumerate(rows(path, wanted), 1):
            yield values if isinstance(values, Rejected) else _entry(number, *values)

    return Source(folder, (path,), entries)


def _entry(number: int, image: str | None, *captions: str | None) -> Entry | Rejected:
    if not image:
        return Rejected(f"row {number}", "no_image", "no path in the row")
    stem, _ = os.path.splitext(image)
    return Entry(make_key(stem), image, tuple(caption or "" for caption in captions))


def _text_names(path: Path, options: dict) -> list[str]:
    try:
        return next(csv.reader(iterate_lines(path), **options), [])
    except csv.Error as error:
        raise ConfigError(f"{path} line 1 is malformed ({error}); check the file") from None


def _text_rows(path: Path, wanted: list[str], options: dict) -> Iterator[list[str] | Rejected]:
    csv.field_size_limit(MAX_FIELD)
    reader = csv.reader(iterate_lines(path), **options)
    try:
        names = next(reader)
        places = [names.index(column) for column in wanted]
        for number, values in enumerate(reader, 1):
            if len(values) == len(names):
                yield [values[place] for place in places]
            elif values:
                why = f"{len(values)} columns, not {len(names)}"
                yield Rejected(f"row {number}", "malformed_row", why)
    except csv.Error as error:
        raise ConfigError(
            f"{path} line {reader.line_num} is malformed ({error}); correct it, or give "
            "--no-quotes if the file does not quote its fields"
        ) from None


def _parquet_rows(path: Path, wanted: list[str]) -> Iterator[list[str | None]]:
    import pyarrow

    try:
        for batch in _parquet(path).iter_batches(ROWS_A_BATCH, columns=wanted):
            columns = [batch.column(name).cast(pyarrow.string()).to_pylist() for name in wanted]
            yield from map(list, zip(*columns, strict=True))
    except (OSError, pyarrow.ArrowException) as error:
        raise unreadable(path, error) from None


def _parquet(path: Path):
    """The open file, a pyarrow.parquet.ParquetFile."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ConfigError(
            f"TABLE is {path}, but pyarrow is not installed; pip install -e '.[convert]' "
            "in the checkout"
        ) from None
    try:
        return parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise unreadable(path, error) from None
