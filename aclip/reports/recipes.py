"""The recipes of runs on a page: what they are, where they differ, and where one changed."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import yaml

from aclip.reports.document import Block, Code, Heading, Table, Text
from aclip.run_folder.layout import RECIPE_FILE, later_records
from aclip.run_folder.metrics_file import flatten

SILENT = ("stages", "train/seed")
"""Keys that each stage changes and nobody asks for."""


def recipe_changes_at(folder: Path) -> dict[int, str]:
    """Where a run went on with another recipe, at the begin of a stage or by --allow_changes.

    Returns:
        `from N samples on: key then -> now, ...` by N.
    """
    later = later_records(folder, RECIPE_FILE)
    records = [_values(path) for path in (folder / RECIPE_FILE, *later)] if later else []
    samples = [int(path.stem.rpartition("-")[2]) for path in later]
    return {
        at: f"from {at:,} samples on: {', '.join(_differences(then, now)) or 'as before'}"
        for at, (then, now) in zip(samples, pairwise(records), strict=True)
    }


def _values(path: Path) -> dict[str, object]:
    return dict(flatten(yaml.safe_load(path.read_text()))) if path.is_file() else {}


def _differences(then: dict[str, object], now: dict[str, object]) -> Iterator[str]:
    for key in dict.fromkeys([*then, *now]):
        before, after = then.get(key), now.get(key)
        if before != after and key not in SILENT:
            yield f"{key.replace('/', '.')} {_show(before)} -> {_show(after)}"


def _show(value: object) -> str:
    return "none" if value is None else str(value)


def recipe_blocks(recipes: dict[str, tuple[str, str]]) -> list[Block]:
    """A run's recipe, or where those of several runs differ.

    Args:
        recipes: by the run's name, as YAML: of its last stage, which is shown, and of the first
            with all that follow, which is compared.
    """
    if len(recipes) == 1:
        ((last, _),) = recipes.values()
        return [Heading("Recipe"), Code(last)]
    values = [dict(flatten(yaml.safe_load(first))) for _, first in recipes.values()]
    keys = dict.fromkeys(key for recipe in values for key in recipe)
    rows = [
        (key.replace("/", "."), *(str(recipe.get(key, "")) for recipe in values))
        for key in keys
        if len({str(recipe.get(key, "")) for recipe in values}) > 1
    ]
    if not rows:
        return [Heading("Recipes"), Text("The recipes are the same.")]
    return [Heading("Where the recipes differ"), Table(("", *recipes), rows)]
