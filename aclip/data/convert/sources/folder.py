"""A folder of images with a text file of the same name beside each, at any depth."""

import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from aclip.data.captions import CAPTION_SUFFIXES, TEXT_SUFFIXES
from aclip.data.convert.entries import Entry, Note, Rejected, Source, make_key
from aclip.data.convert.other_formats import SUFFIXES as OTHER_FORMATS
from aclip.data.convert.sources.text_files import existing_folder
from aclip.data.images.suffixes import IMAGE_SUFFIXES, is_litter
from aclip.errors import ConfigError

OWN_NAMES = (".conversion", ".owner")
"""What a conversion leaves in --out until its end; the folder may hold it."""
LONGEST_SUFFIX = 10


def folder_source(folder: str) -> Source:
    """The images of a folder in the order of their paths; NAME.txt, NAME.caption and NAME.json
    hold the captions of NAME.jpg.

    Suffixes may be upper case, links are followed, and what is no image and no caption is noted.
    There is no metadata, so that a conversion is not continued after one of these files has
    changed, come or gone.

    Raises:
        ConfigError: no such folder; while iterating, a folder in it can't be read.
    """
    root = existing_folder(folder, "FOLDER")
    return Source(root, (), lambda: _entries(root))


def _entries(root: Path) -> Iterator[Entry | Rejected | Note]:
    visited = set()

    def refuse(error: OSError) -> None:
        raise ConfigError(
            f"FOLDER holds {error.filename}, which can't be read ({error.strerror}); check it"
        )

    for folder, folders, names in os.walk(root, onerror=refuse, followlinks=True):
        status = os.stat(folder)
        identity = (status.st_dev, status.st_ino)
        if identity in visited:  # a link upwards
            folders.clear()
            continue
        visited.add(identity)
        below = os.path.relpath(folder, root)
        below = "" if below == os.curdir else f"{below}{os.sep}"
        litter = [name for name in (*folders, *names) if is_litter(name)]
        for name in sorted(set(litter) - {*OWN_NAMES}):
            yield Note(make_key(below + name), "litter", "of a system or another tool")
        folders[:] = sorted(set(folders) - {*litter})
        yield from _files(below, sorted(set(names) - {*litter}))


def _files(below: str, names: list[str]) -> Iterator[Entry | Rejected | Note]:
    """What the files of one folder are, whose path below the root ends with a slash."""
    images: list[str] = []
    beside: dict[str, list[str]] = defaultdict(list)
    others: list[str] = []
    for name in names:
        stem, suffix = os.path.splitext(name)
        if suffix.lower() in CAPTION_SUFFIXES:
            beside[stem].append(name)
        else:
            is_image = suffix.lower() in IMAGE_SUFFIXES | OTHER_FORMATS
            (images if is_image else others).append(name)
    for name in images:
        stem, suffix = os.path.splitext(name)
        key, suffix = make_key(below + stem), suffix.lower()
        files = sorted(
            beside[stem], key=lambda name: CAPTION_SUFFIXES.index(os.path.splitext(name)[1].lower())
        )
        if suffix in OTHER_FORMATS:
            yield Rejected(key, f"unsupported_format ({suffix})", "make it a .jpg or .png")
        elif files:
            yield Entry(key, below + name, caption_files=tuple(below + file for file in files))
        else:
            yield Rejected(key, "no_caption", f"no {', '.join(CAPTION_SUFFIXES)} beside it")
    captioned = {os.path.splitext(name)[0] for name in images}
    for stem in sorted(beside.keys() - captioned):
        for name in beside[stem]:
            if os.path.splitext(name)[1].lower() in TEXT_SUFFIXES:
                yield Rejected(make_key(below + stem), "no_image", f"no image beside {name}")
            else:
                others.append(name)
    for name in others:
        suffix = os.path.splitext(name)[1].lower()
        is_usual = suffix[1:].isalnum() and len(suffix) <= LONGEST_SUFFIX
        kind = f"other_file ({suffix if is_usual else 'without a suffix'})"
        yield Note(make_key(below + name), kind, "neither an image nor a caption")
