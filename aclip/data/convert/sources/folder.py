"""A folder of images with a text file of the same name beside each, at any depth."""

import os
from collections.abc import Iterator
from pathlib import Path

from aclip.data.convert.entries import Entry, Rejected, Source, make_key
from aclip.data.convert.sources.text_files import existing_folder
from aclip.errors import ConfigError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")


def folder_source(folder: str) -> Source:
    """The images of a folder in the order of their paths; NAME.txt is the caption of NAME.jpg.

    Files of other kinds are passed over, links are followed. There is no metadata, so that a
    conversion is not continued after one of these files has changed, come or gone.

    Raises:
        ConfigError: no such folder; while iterating, a folder in it can't be read.
    """
    root = existing_folder(folder, "FOLDER")
    return Source(root, (), lambda: _entries(root))


def _entries(root: Path) -> Iterator[Entry | Rejected]:
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
        folders.sort()
        present = set(names)
        images = [name for name in sorted(names) if Path(name).suffix.lower() in SUFFIXES]
        captioned = {Path(name).stem for name in images}
        for name in images:
            path = os.path.relpath(os.path.join(folder, name), root)
            stem, _ = os.path.splitext(path)
            if f"{Path(name).stem}.txt" in present:
                yield Entry(make_key(stem), path, caption_file=f"{stem}.txt")
            else:
                yield Rejected(make_key(stem), "no_caption", "no .txt beside it")
        for name in sorted(names):
            stem, suffix = os.path.splitext(name)
            if suffix == ".txt" and stem not in captioned:
                path = os.path.relpath(os.path.join(folder, stem), root)
                yield Rejected(make_key(path), "no_image", "no image beside the .txt")
