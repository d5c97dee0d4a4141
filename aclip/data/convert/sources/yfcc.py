"""YFCC100M as SLIP lays it out: zips by line number, and the captioned images' list."""

import json
from collections.abc import Iterator
from pathlib import Path

from aclip.data.convert.entries import Entry, Note, Rejected, Source
from aclip.data.convert.sources.pickle_stream import iterate_pickled_list
from aclip.data.convert.sources.text_files import TextLines, existing_file, existing_folder
from aclip.errors import ConfigError

NUM_IDS = 10**8
"""An id is a line number of YFCC100M's metadata."""


def yfcc_source(metadata: str, images: str) -> Source:
    """The images of a list, each with its title and description as captions.

    Image 12345678 is 678.jpg in 12/345.zip.

    Args:
        metadata: SLIP's yfcc15m.pkl, a pickled list of (id, title, description), or the .jsonl that
            yfcc_list.py writes.
        images: the folder that holds 00/000.zip to 99/999.zip.

    Raises:
        ConfigError: no such file or folder; while iterating, the list is malformed.

    Source: facebookresearch/SLIP, README.md, section 1.1.
    """
    path = existing_file(metadata, "METADATA")
    is_pickle = path.suffix in (".pkl", ".pickle")

    def entries() -> Iterator[Entry | Rejected | Note]:
        lines = TextLines(path)
        rows = iterate_pickled_list(path) if is_pickle else _json_rows(lines)
        return lines.noted(_entry(path, row) for row in rows)

    return Source(existing_folder(images, "--images"), (path,), entries)


def _entry(path: Path, row: object) -> Entry | Rejected:
    if not isinstance(row, tuple | list) or len(row) != 3 or not isinstance(row[0], int):
        raise ConfigError(
            f"{path} holds {str(row)[:80]}, which is not (id, title, description); give the list "
            "of YFCC's captioned images"
        )
    index, *captions = row
    if not 0 <= index < NUM_IDS:
        return Rejected(str(index), "malformed_row", f"id {index} is not below {NUM_IDS}")
    if not all(isinstance(caption, str | None) for caption in captions):
        return Rejected(str(index), "malformed_row", "title or description is no text")
    key = f"{index:08d}"
    return Entry(
        key,
        f"{key[:2]}/{key[2:5]}.zip",
        tuple(caption or "" for caption in captions),
        member=f"{key[5:]}.jpg",
    )


def _json_rows(lines: TextLines) -> Iterator[tuple]:
    for line in lines:
        try:
            row = json.loads(line)
            yield row["id"], row["title"], row["description"]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{lines.path} line {lines.number} is not an object with id, title and description "
                f"({type(error).__name__}: {error}); give SLIP's .pkl, or make the list anew with "
                "launch/convert.py yfcc-list"
            ) from None
