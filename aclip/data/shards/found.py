"""What lies where shards were looked for, in words: for messages."""

import glob
import os
import shlex
import tarfile
from collections import Counter
from itertools import islice
from pathlib import Path

MAX_ENTRIES = 100_000
"""How many entries of a folder are looked at."""
LINK = " (a link)"
LINKS_ADVICE = " (links hold no bytes: pack with tar -h --hard-dereference)"
NAMED = 5
"""How many kinds of files, or of members, a sentence names."""

# First bytes -> the name, and the command that unpacks to standard output.
COMPRESSIONS = {
    b"\x1f\x8b": ("gzip", "gzip -dc"),
    b"BZh": ("bzip2", "bzip2 -dc"),
    b"\xfd7zXZ\0": ("xz", "xz -dc"),
    b"\x28\xb5\x2f\xfd": ("Zstandard", "zstd -dc"),
    b"\x04\x22\x4d\x18": ("LZ4", "lz4 -dc"),
}
# First bytes -> what the file is, and what to do.
OTHER_FILES = {
    b"PK\x03\x04": ("a zip archive", "unpack it and pack the files with tar --sort=name"),
    b"version https://git-lfs": ("a pointer of Git LFS", "fetch the file itself with git lfs pull"),
    b"<": ("a page of HTML or XML", "check where it was downloaded from"),
}
SUFFIXES = (".gz", ".tgz", ".bz2", ".tbz2", ".tbz", ".xz", ".txz", ".zst", ".tzst", ".lz4", ".zip")
"""How names of compressed shards end."""


def describe_parent(path: str) -> str:
    """What the folder of an absent file, or of a pattern, holds: `/d holds 12 .tar files`. If that
    folder is absent too, this says so, and what the nearest one above it holds."""
    folder, absent = Path(path).absolute().parent, None
    while not folder.is_dir():
        folder, absent = folder.parent, folder
    found = f"{folder} {describe_folder(folder)}"
    if absent is None or glob.has_magic(absent.name):
        return found
    return f"there is no folder {absent}, and {found}"


def describe_folder(folder: Path) -> str:
    """`holds 12 .tar files, 1 .json file and 2 folders`, the most frequent first."""
    try:
        with os.scandir(folder) as entries:
            kinds = Counter(_kind(entry) for entry in islice(entries, MAX_ENTRIES))
    except OSError as error:
        return f"can't be read ({error.strerror})"
    if not kinds:
        return "is empty"
    folders = kinds.pop("", 0)
    parts = [f"{count:,} {kind}{'s'[: count > 1]}" for kind, count in kinds.most_common(NAMED)]
    others = kinds.total() - sum(count for _, count in kinds.most_common(NAMED))
    if others:
        parts.append(f"{others:,} other file{'s'[: others > 1]}")
    if folders:
        parts.append(f"{folders:,} folder{'s'[: folders > 1]}")
    return f"holds {join_words(parts)}"


def _kind(entry: os.DirEntry) -> str:
    if entry.is_dir():
        return ""
    if entry.is_symlink() and not os.path.exists(entry.path):
        return "link to nothing"
    return f"{printable(os.path.splitext(entry.name)[1])} file".strip()


def refusal_of_content(url: str, head: bytes, is_remote: bool) -> str | None:
    """Why a file that begins with these bytes is no shard, in a sentence; None where they say
    nothing about it.

    Args:
        head: the first 512 bytes, or what there is of them.
    """
    try:
        tarfile.TarInfo.frombuf(head[:512], "utf-8", "replace")
        return None  # a tar, whatever its first member is called
    except tarfile.HeaderError:
        pass
    for magic, (name, command) in COMPRESSIONS.items():
        if head.startswith(magic):
            unpacked = f"{command} {shlex.quote(url)} > {shlex.quote(_unpacked(url))}"
            if is_remote:
                unpacked = f"or read it as 'pipe:COMMAND | {command}'"
            return (
                f"shard {url} is compressed ({name}), which can't be read at any place; unpack it, "
                f"{unpacked}"
            )
    for magic, (name, advice) in OTHER_FILES.items():
        if head.lstrip().startswith(magic):
            return f"shard {url} is no tar but {name}; {advice}"
    return None


def _unpacked(path: str) -> str:
    stem, suffix = os.path.splitext(path)
    if suffix.lower() not in SUFFIXES:
        return f"{stem}.unpacked{suffix}"
    return stem if stem.lower().endswith(".tar") else f"{stem}.tar"


def list_suffixes(counts: Counter[str]) -> str:
    """`jpg (12) and input.txt (3)`: suffixes and how often each comes, the most frequent first."""
    named = [f"{suffix} ({count:,})" for suffix, count in counts.most_common(NAMED)]
    others = len(counts) - len(named)
    text = join_words([*named, f"{others:,} others"] if others > 0 else named)
    return text + (LINKS_ADVICE if LINK in text else "")


def join_words(words: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


def printable(name: str) -> str:
    """A name in which bytes that are no UTF-8 are written as `\\xff`, so that it can be printed."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
