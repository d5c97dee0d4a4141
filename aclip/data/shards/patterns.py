"""What a recipe's entry names: braces, globs, folders, and the notations of other tools."""

import glob
import itertools
import math
import os
import re
import shlex
from pathlib import Path

import fsspec
from braceexpand import braceexpand

from aclip.data.images.suffixes import is_litter
from aclip.data.shards.found import (
    SUFFIXES,
    describe_folder,
    describe_parent,
    refusal_of_content,
)
from aclip.data.shards.remote import check_protocol
from aclip.errors import ConfigError

MAX_NAMES = 3_000_000
"""More names than these are taken for a mistake, before they fill the memory."""
RANGE = re.compile(r"(?:(-?\d+)\.\.(-?\d+)|([A-Za-z])\.\.([A-Za-z]))(?:\.\.-?(\d+))?")
ARCHIVES = ("zip", "tar", "libarchive")
"""Protocols of fsspec that read inside of a file at the address that follows behind `::`."""


def addresses(entry: str, field: str) -> list[str]:
    """The addresses, or commands, that an entry names."""
    is_command = entry.startswith("pipe:")
    first, *others = entry.split("::")
    if first.endswith("//["):
        raise ConfigError(
            f"{field} holds {entry}, an address of IPv6, which fsspec can't read; give the host's "
            "name, or a command, e.g. 'pipe:curl -sf ADDRESS'"
        )
    if is_command:
        is_list = any(part.startswith("pipe:") for part in others)
    else:
        is_chain = "/" not in first or fsspec.utils.get_protocol(first) in ARCHIVES
        is_list = bool(others) and not is_chain
    if is_list:
        raise _other_notation(entry, field)
    check_protocol(entry, field)
    if is_command:
        return expand_braces(entry, field)
    if "*" in entry:
        raise ConfigError(
            f"{field} holds {entry}, but what lies at an address can't be listed; write the shards "
            "with braces, e.g. {00000..00099}.tar"
        )
    if entry.partition("?")[0].lower().endswith(SUFFIXES) and not others:
        raise ConfigError(
            f"{field} holds {entry}, which is compressed by its name, so that no place in it can "
            "be read; unpack the shards, or give a command, e.g. 'pipe:aws s3 cp s3://bucket/"
            "{00..99}.tar.gz - | gzip -dc'"
        )
    return expand_braces(entry, field)


def local_files(entry: str, field: str) -> list[str]:
    """The files that a path names: each exists.

    Raises:
        ConfigError: nothing is there, or what is there is no shard; says what was found.
    """
    if "::" in entry and not os.path.exists(entry):
        raise _other_notation(entry, field)
    files = []
    for path in expand_braces(entry, field):
        files += _existing_files(path, entry, field)
    for path in files:
        if path == files[0] or path.lower().endswith(SUFFIXES):
            _refuse_other_content(path, field)
    return files


def expand_braces(entry: str, field: str) -> list[str]:
    """The names that an entry with braces stands for; of a command, only ranges are expanded."""
    try:
        if (number := _count_names(entry)) > MAX_NAMES:
            raise ConfigError(
                f"{field} holds {entry}, whose braces stand for {number:,} names, more than "
                f"{MAX_NAMES:,}; check the ranges, or give a list of shorter ones"
            )
        if entry.startswith("pipe:"):
            # Only ranges: a command has braces, commas and backslashes of its own.
            parts = re.split(r"(\{\w+\.\.\w+\})", entry)
            parts[1::2] = map(braceexpand, parts[1::2])
            parts[::2] = ([text] for text in parts[::2])
            return ["".join(chosen) for chosen in itertools.product(*parts)]
        return list(braceexpand(entry))
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{field} holds {entry}, whose braces do not match: {error}") from None


def _count_names(entry: str) -> int:
    """How many names the braces stand for, without making one."""
    if entry.startswith("pipe:"):
        ranges = [RANGE.fullmatch(text[1:-1]) for text in re.findall(r"\{\w+\.\.\w+\}", entry)]
        return math.prod(_length(found) for found in ranges if found)
    text = re.sub(r"\\.", "", entry)
    while innermost := re.search(r"\{([^{}]*)\}", text):
        content = innermost[1]
        found = RANGE.fullmatch(content)
        number = _length(found) if found else sum(map(_product, content.split(",")))
        text = f"{text[: innermost.start()]}\0{number}\0{text[innermost.end() :]}"
    return _product(text)


def _product(text: str) -> int:
    """The product of the counts that _count_names has put in the place of braces."""
    return math.prod(int(number) for number in re.findall("\0(\\d+)\0", text))


def _length(found: re.Match) -> int:
    numbers, letters, step = found.group(1, 2), found.group(3, 4), int(found[5] or 1)
    first, last = map(ord, letters) if numbers[0] is None else map(int, numbers)
    return abs(last - first) // max(1, step) + 1


def _other_notation(entry: str, field: str) -> ConfigError:
    parts = re.split(r"::(?=pipe:)" if entry.startswith("pipe:") else "::", entry)
    quoted = ", ".join(f'"{part}"' for part in parts)
    weighted = ", ".join(f'{{shards: "{part}", weight: 1}}' for part in parts)
    field = field.removeprefix("--")
    return ConfigError(
        f"{field} is {entry}, which joins data sets with :: as open_clip does; write "
        f"{field}={shlex.quote(f'[{quoted}]')}, or, with a weight for each in place of "
        f"--train-data-upsampling-factors, data.sources={shlex.quote(f'[{weighted}]')}"
    )


def _existing_files(path: str, entry: str, field: str) -> list[str]:
    if os.path.isfile(path):
        return [path]
    if os.path.isdir(path):
        return _shards_in(Path(path), entry, field)
    if glob.has_magic(path):
        found = sorted(glob.glob(path, recursive=True))
        for match in found:
            _refuse_dead_link(match, entry, field)
        files = [match for match in found if os.path.isfile(match)]
        if files:
            return files
        what = "only folders match" if found else "no file matches"
        raise ConfigError(
            f"{field} is {entry}, but {what} {path}; {describe_parent(path)}; check the path"
        )
    _refuse_dead_link(path, entry, field)
    raise ConfigError(
        f"{field} is {entry}, but there is no file {path}; {describe_parent(path)}; check the path"
    )


def _shards_in(folder: Path, entry: str, field: str) -> list[str]:
    """The shards of a folder, not of those below it."""
    tars = sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() == ".tar" and not is_litter(path.name)
    )
    for path in tars:
        _refuse_dead_link(str(path), entry, field)
    files = [str(path) for path in tars if path.is_file()]
    if not files:
        raise ConfigError(
            f"{field} is {entry}, a folder that {describe_folder(folder)}, but no .tar file; give "
            "shards, which launch/convert.py makes of images and captions"
        )
    return files


def _refuse_dead_link(path: str, entry: str, field: str) -> None:
    if os.path.islink(path) and not os.path.exists(path):
        raise ConfigError(
            f"{field} is {entry}, but {path} is a link to {os.readlink(path)}, where nothing is; "
            "mend or remove the link"
        )


def _refuse_other_content(path: str, field: str) -> None:
    try:
        with open(path, "rb") as file:
            head = file.read(512)
    except OSError:
        return  # said where it is counted, and perhaps skipped
    refusal = refusal_of_content(path, head, is_remote=False)
    if refusal is not None:
        raise ConfigError(f"{field}: {refusal}")
