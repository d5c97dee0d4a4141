"""CC3M and CC12M: Google's tsv of captions and urls, and a folder of downloaded images."""

import os
import zlib
from collections.abc import Iterator
from pathlib import Path

from aclip.data.convert.entries import Entry, Note, Rejected, Source, make_key
from aclip.data.convert.sources.text_files import TextLines, existing_file, existing_folder
from aclip.errors import ConfigError

COLUMNS = {"cc3m": ("caption", "url"), "cc12m": ("url", "caption")}
NAMES = {"cc3m": "{crc32}", "cc12m": "{row}.jpg"}
"""An image's path below the folder, as SLIP describes it."""


def conceptual_source(release: str, tsv: str, images: str, name: str | None) -> Source:
    """The images that were downloaded of a tsv; the others are counted as no_image.

    Args:
        release: a key of COLUMNS.
        tsv: the file that Google publishes; a first line that names the columns is no row.
        images: the folder of the images.
        name: an image's path below it, with {row} (from 0), {thousand} (row modulo 1000) and
            {crc32} (of the url, as the common downloader names files); None for NAMES.

    Raises:
        ConfigError: no such file or folder, or `name` holds another field; while iterating, the
            columns are those of the other release.
    """
    path = existing_file(tsv, "TSV")
    name = name or NAMES[release]
    _image_name(name, 0, "")

    def rows(lines: TextLines) -> Iterator[Entry | Rejected]:
        header = "\t".join(COLUMNS[release])
        row = 0
        for line in lines:
            line = line.rstrip("\r\n")
            if row == 0 and line == header:
                continue
            yield _entry(release, path, name, row, line)
            row += 1

    def entries() -> Iterator[Entry | Rejected | Note]:
        lines = TextLines(path)
        return lines.noted(rows(lines))

    return Source(existing_folder(images, "--images"), (path,), entries)


def _entry(release: str, path: Path, name: str, row: int, line: str) -> Entry | Rejected:
    values = line.split("\t")
    if len(values) != 2:
        return Rejected(f"row {row}", "malformed_row", f"{len(values)} columns, not 2: {line[:80]}")
    columns = dict(zip(COLUMNS[release], values, strict=True))
    if row == 0 and "://" in columns["caption"] and "://" not in columns["url"]:
        raise ConfigError(
            f"{path} has the url where {release} has the caption; take "
            f"{next(other for other in COLUMNS if other != release)}"
        )
    image = _image_name(name, row, columns["url"])
    return Entry(make_key(os.path.splitext(image)[0]), image, (columns["caption"],))


def _image_name(name: str, row: int, url: str) -> str:
    try:
        return name.format(row=row, thousand=row % 1000, crc32=zlib.crc32(url.encode()))
    except (KeyError, ValueError, IndexError, AttributeError) as error:
        raise ConfigError(
            f"--name is {name} ({type(error).__name__}: {error}); use {{row}}, {{thousand}} and "
            "{crc32}, e.g. {row:09d}.jpg"
        ) from None
