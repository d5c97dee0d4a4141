"""What every source yields: one entry for each image with its captions, or why there is none."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

SKIP_KINDS = (
    "unreadable_image",
    "unsupported_format",
    "image_too_small",
    "no_image",
    "empty_caption",
    "no_caption",
    "duplicate_key",
    "malformed_row",
)
"""Why an entry becomes no sample; the loader's words where it knows the case too. The format may
stand behind a kind: `unsupported_format (.heic)`."""
FURTHER_CAPTION = "further_caption"
"""An entry of an image that an earlier entry names: its captions are added to that one's."""


@dataclass(frozen=True, slots=True)
class Entry:
    """An image that is to become a sample."""

    key: str
    """Unique in the data set, from make_key."""
    image: str
    """Path below the source's `images`, or of the zip that holds `member`."""
    captions: tuple[str, ...] = ()
    member: str | None = None
    caption_files: tuple[str, ...] = ()
    """Paths below `images` of the files that hold the captions, in place of `captions`: .json, and
    others with a caption a line."""


@dataclass(frozen=True, slots=True)
class Rejected:
    """An entry that becomes no sample."""

    key: str
    kind: str
    """One of SKIP_KINDS."""
    why: str


@dataclass(frozen=True, slots=True)
class Note:
    """What is counted without being an entry: how a caption was read, or a file passed over."""

    key: str
    kind: str
    why: str


@dataclass(frozen=True)
class Source:
    """A data set on disk.

    Attributes:
        images: folder that the entries' paths are relative to.
        files: the metadata; a conversion is not continued after they have changed. Without any,
            that holds for the images and captions themselves.
        entries: called to iterate over all entries, always in the same order.
    """

    images: Path
    files: tuple[Path, ...]
    entries: Callable[[], Iterator[Entry | Rejected | Note]]


def make_key(path: str) -> str:
    """The key of a path without suffix: ASCII, different for different paths.

    WebDataset ends a key at the first dot of the file name, and the loader passes over names like
    `__x__`, so dots and leading underscores are percent-encoded as all unsafe characters are.
    """
    key = quote(os.fsencode(path)).replace(".", "%2E")
    for first, code in (("/", "%2F"), ("__", "%5F_")):
        if key.startswith(first):
            return code + key[len(first) :]
    return key
