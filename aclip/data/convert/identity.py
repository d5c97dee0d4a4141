"""What a conversion must agree in to be continued, and in what two of them differ."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aclip.data.convert.entries import Entry, Note, Source
from aclip.data.progress import progress_bar

OPTIONS = {
    "min_side": "--min-side",
    "short_side": "--short-side",
    "encoding": "--format",
    "quality": "--quality",
    "folder": "the folder of the images",
    "shard_size": "--shard-size",
    "source": "the kind of source",
    "format_version": "the version of the shards' format",
}
"""What the values of an identity are called on the command line, where that is not plain."""


def stamps(source: Source) -> dict[str, Any]:
    """By path, what changes when the metadata do; without metadata, when the folder's files do."""
    if not source.files:
        return {str(source.images.absolute()): _digest(source)}
    found = {path: path.stat() for path in source.files}
    return {
        str(path.absolute()): [status.st_size, status.st_mtime_ns] for path, status in found.items()
    }


def differences(then: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """What differs between the identities of two conversions, in words."""
    for name in sorted({*then, *now} - {"files"}):
        before, after = then.get(name), now.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            yield from differences(before, after)
        elif before != after:
            option = OPTIONS.get(name, f"--{name.replace('_', '-')}")
            yield f"{option} was {_show(before)} and is {_show(after)}"
    old, new = then.get("files", {}), now.get("files", {})
    for path in sorted({*old, *new}):
        if path not in new:
            yield f"it was of {path}"
        elif path not in old:
            yield f"now it is of {path}"
        elif old[path] != new[path]:
            is_folder = isinstance(new[path], str)
            what = "an image or a caption below" if is_folder else "the file"
            yield f"{what} {path} was changed"


def _show(value: Any) -> str:
    if isinstance(value, list):
        return " and ".join(map(str, value))
    return "not given" if value in (None, False) else "given" if value is True else str(value)


def _digest(source: Source) -> str:
    """A digest of path, size and time of every image and caption file, and of what is left out.

    Folders are not in it, since --out may lie in one of them.
    """
    digest = hashlib.sha256()
    for entry in progress_bar(source.entries(), desc="looking for changes", unit=" entries"):
        if isinstance(entry, Note):
            continue
        if isinstance(entry, Entry):
            paths = (entry.image, *entry.caption_files)
            facts = [(path, _stamp(source.images / path)) for path in paths]
        else:
            facts = [entry.key, entry.kind]
        digest.update(json.dumps(facts).encode() + b"\n")
    return digest.hexdigest()


def _stamp(path: Path) -> list[int] | None:
    try:
        status = path.stat()
    except OSError:  # such as a link to nowhere, which is skipped and counted later
        return None
    return [status.st_size, status.st_mtime_ns]
