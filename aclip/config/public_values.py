"""What may be shown to everybody of a recipe and of messages: names in place of paths, addresses
and commands."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aclip.config.recipe import Recipe

NAMED = (
    "data.train",
    "data.val",
    "data.sources.shards",
    "model.init",
    "model.text.name",
    "text.word_counts",
)
"""Keys whose values say where something lies."""
OF_MACHINE = ("data.cache", "train.upload_to", "train.wandb")
"""Keys that tell nothing of a model, but of whoever trained it: they are emptied."""
COMMAND = "a command"
_KINDS = ("timm:", "local-dir:")
"""What stands in front of a path and is kept."""
_FOLDERS_OF_USERS = ("home", "Users")
_IN_TEXT = re.compile(
    r"""\b(?!https?://)\w+://[^\s'"]+ | (?<![\w.:/~-])(?:~\w*|\.{1,2})?/[^\s'"(),;:]+""", re.X
)
"""An address that is no web page's, or a path."""


def public_values(recipe: Recipe) -> dict[str, Any]:
    """The recipe's values, description first, as they can be shown to everybody."""
    values = {"description": recipe.description} | recipe.model_dump(mode="json")
    return _public(values, "")


def _public(value: Any, key: str) -> Any:
    if isinstance(value, dict):
        return {name: _public(each, f"{key}.{name}".lstrip(".")) for name, each in value.items()}
    if isinstance(value, list):
        # A stage holds the sections that a recipe holds.
        of_items = "" if key == "stages" else key
        return [_public(each, of_items) for each in value]
    if not isinstance(value, str) or not value:
        return value
    if key in OF_MACHINE:
        return ""
    return public_name(value) if key in NAMED else public_text(value)


def public_name(place: str) -> str:
    """What a path, a pattern, an address or a command may be called in front of everybody: its last
    part; where that is no name, such as `*.tar`, with its folder's name before it."""
    if place.startswith("pipe:"):
        return COMMAND
    if place.startswith("hf-hub:"):
        return place
    for kind in _KINDS:
        if place.startswith(kind):
            return kind + public_name(place.removeprefix(kind))
    is_address = "://" in place
    parts = [part for part in re.split(r"[/\\]", place.partition("?")[0]) if part]
    if is_address:
        parts = parts[2:]  # behind protocol and host, or bucket
    *folders, name = parts or [""]
    if re.search("[A-Za-z]", name.removesuffix(".tar")) or not folders:
        return name or COMMAND
    above = folders[-1]
    is_users = above == Path.home().name or (len(folders) > 1 and folders[-2] in _FOLDERS_OF_USERS)
    is_name = re.search("[A-Za-z]", above) and not is_users
    return f"{above}/{name}" if is_name else name


def public_names(places: str | list[str]) -> list[str]:
    """The public names of what a key of shards gives, each once."""
    return list(dict.fromkeys(_names(places)))


def _names(places: str | list[str]) -> Iterator[str]:
    for place in [places] if isinstance(places, str) else places:
        if place:
            yield public_name(place)


def public_text(text: str) -> str:
    """A sentence in which paths, and addresses but those of web pages, have become names."""
    return _IN_TEXT.sub(lambda found: public_name(found[0]), text)
