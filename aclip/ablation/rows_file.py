"""Rows of one's own for launch/ablate.py: a YAML file of methods that are compared.

random: {label: "random, {keep} %", overrides: [mask.policy=random, teacher=null]}
attentive: {label: "attentive, {keep} %", overrides: [mask.policy=attentive], against: random}
flip: {recipe: flip_vitb16, overrides: []}
"""

from collections.abc import Sequence
from pathlib import Path

import yaml
from pydantic import ValidationError

from aclip.ablation.rows import Row
from aclip.errors import ConfigError
from aclip.section import Section

SUFFIXES = (".yaml", ".yml")


class RowValues(Section):
    """What the file says of a row; see Row."""

    label: str = ""
    """What tables call it; empty for its name."""
    overrides: list[str]
    against: str = ""
    """The row from which its difference is shown, seed by seed."""
    drops_patches: bool | None = None
    """Whether it is trained at each --keep_ratio; empty for yes, unless it has a recipe."""
    recipe: str = ""
    """A recipe from which it takes the method: its masks, views, teacher, losses, the length of its
    captions and its stages."""


def read_rows(path: str, chosen: Sequence[str] = ()) -> list[Row]:
    """The rows of a file, in its order.

    Args:
        chosen: names of the rows to take; none for all.

    Raises:
        ConfigError: the file can't be read, is not YAML, a row in it is wrong, or there is no row
            of a chosen name.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
        raise ConfigError(
            f"--rows names {path}, which can't be read ({reason}); give a YAML file of rows"
        ) from None
    if not isinstance(values, dict) or not values:
        raise ConfigError(
            f"--rows names {path}, which holds no rows; write each as "
            "name: {label: ..., overrides: [key.sub=value, ...]}"
        )
    rows = [_row(path, str(name), of_row) for name, of_row in values.items()]
    names = {row.name for row in rows}
    for row in rows:
        others = sorted(names - {row.name})
        if row.against and row.against not in others:
            way_out = f"take one of {', '.join(others)}" if others else "leave it out"
            raise ConfigError(
                f"{row.name} in {path} is against {row.against}, which is no other row of the "
                f"file; {way_out}"
            )
    unknown = sorted(set(chosen) - names)
    if unknown:
        raise ConfigError(
            f"--rows names {unknown[0]}, but {path} has the rows {', '.join(sorted(names))}"
        )
    rows = [row for row in rows if not chosen or row.name in chosen]
    for row in rows:
        if row.against and chosen and row.against not in chosen:
            raise ConfigError(
                f"--rows names {row.name}, which {path} compares with {row.against}; name that too"
            )
    return rows


def _row(path: str, name: str, values: object) -> Row:
    if not name.replace("_", "").replace("-", "").isalnum():
        raise ConfigError(
            f"{path} has a row {name!r}, but it names a folder; use letters, digits, _ and -"
        )
    try:
        read = RowValues.model_validate(values, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, (name, *first["loc"])))
        raise ConfigError(
            f"{where} in {path} is {first['input']!r}: {first['msg']}; write a row as "
            "name: {label: ..., overrides: [key.sub=value, ...]}"
        ) from None
    drops_patches = read.drops_patches
    return Row(
        name,
        label=read.label or name,
        published=None,
        overrides=tuple(read.overrides),
        drops_patches=not read.recipe if drops_patches is None else drops_patches,
        against=read.against,
        recipe=read.recipe,
    )
