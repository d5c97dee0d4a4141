"""Rows made into what is trained: a recipe for each row and keep ratio, with the points at which
its runs are compared."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from aclip.ablation.rows import Row
from aclip.config.recipe import OfTerms, Recipe
from aclip.config.recipe_file import load_recipe, stages_of
from aclip.config.stages import FIXED
from aclip.errors import ConfigError

QUARTERS = 4
"""A run is evaluated at each quarter of its whole length."""
EQUAL = (*FIXED, "data.train", "data.sources", "data.val")
"""Keys that are equal in all rows and their stages: towers, tokenizer and data."""
METHOD = ("text", "views", "ssl_augment", "mask", "teacher", "loss", *OfTerms.model_fields)
"""Sections that a row takes from a recipe of its own; its stages too, and their proportions."""


@dataclass(frozen=True)
class Case:
    """A row at one keep ratio: what is trained with each seed.

    Attributes:
        keep_ratio: None where nothing is dropped.
        base: the name or path of the recipe that it changes.
        overrides: what it changes of the base, with the user's own changes.
        recipe: the resolved recipe with seed 0.
        flops: of a run up to each of its evaluations, at 0, 25, 50, 75 and 100 %; empty until the
            evaluations are placed.
    """

    row: Row
    keep_ratio: float | None
    base: str
    overrides: tuple[str, ...]
    recipe: Recipe
    flops: tuple[float, ...] = ()

    @property
    def name(self) -> str:
        return self.row.name if self.keep_ratio is None else f"{self.row.name}-keep{self.keep}"

    @property
    def label(self) -> str:
        return self.row.label.replace("{keep}", self.keep)

    @property
    def keep(self) -> str:
        return "100" if self.keep_ratio is None else f"{100 * self.keep_ratio:g}"

    @property
    def points(self) -> list[int]:
        """Samples after which a run is evaluated, at 0, 25, 50, 75 and 100 % of it."""
        return [0, *self.recipe.train.evaluate_at]

    def changed(self, changes: Iterable[str]) -> "Case":
        """The case with more overrides, which count before those that it has."""
        overrides = (*self.overrides, *changes)
        return replace(self, overrides=overrides, recipe=load_recipe(self.base, overrides))


def make_cases(
    rows: list[Row], base: str, overrides: list[str], keep_ratios: list[float]
) -> list[Case]:
    """Every row at every keep ratio that means something to it.

    Args:
        base: the name or path of a recipe with a teacher.
        overrides: what the user changes of it, in all rows.

    Raises:
        ConfigError: the base has no teacher, a row can't be made of it (see load_recipe), or
            changes towers, tokenizer or data.
    """
    base_recipe = load_recipe(base, overrides)
    if base_recipe.teacher is None:
        raise ConfigError(
            f"--recipe is {base}, which has no teacher; take one with a teacher, whose towers, "
            "data and schedule all rows share, such as demo"
        )
    full = base_recipe.model.image.resolution
    cases = []
    for row in rows:
        for keep_ratio in keep_ratios if row.drops_patches else [None]:
            of_row = (
                change.replace("{full}", f"{full}").replace("{half}", f"{full // 2}")
                for change in row.overrides
            )
            method, lengths = _taken_from(row.recipe)
            changes = [*method, *overrides, *lengths, *of_row]
            if keep_ratio is not None:
                changes.append(f"mask.keep_ratio={keep_ratio:g}")
            recipe = load_recipe(base, changes)
            _check_equal(row, recipe, base_recipe)
            cases.append(Case(row, keep_ratio, base, tuple(changes), recipe))
    return cases


def _taken_from(recipe: str) -> tuple[list[str], list[str]]:
    """What a row takes from a recipe of its own, as overrides: its method, and, where it has
    stages, how long the first one is beside them. Nothing for an empty name."""
    if not recipe:
        return [], []
    values = load_recipe(recipe).model_dump(mode="json")
    method = [f"{section}={json.dumps(values[section])}" for section in METHOD]
    if not values["stages"]:
        return method, []
    method.append(f"stages={json.dumps(values['stages'])}")
    train = values["train"]
    keys = ("epochs", "samples", "warmup_epochs")
    return method, [f"train.{key}={json.dumps(train[key])}" for key in keys]


def _check_equal(row: Row, recipe: Recipe, base: Recipe) -> None:
    expected = base.model_dump(mode="json")
    for stage in stages_of(recipe):
        values = stage.model_dump(mode="json")
        for key in EQUAL:
            here, there = (_value(each, key.split(".")) for each in (values, expected))
            if here != there:
                raise ConfigError(
                    f"row {row.name} sets {key} to {here!r}, but towers, tokenizer and data are "
                    f"equal in all rows ({there!r}); leave it out, or give it on the command line"
                )


def _value(values: dict, names: Sequence[str]) -> object:
    for name in names:
        values = values[name]
    return values
