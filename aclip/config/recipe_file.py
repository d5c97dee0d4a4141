"""Recipe files: YAML checked against aclip.config, by name or path, with overrides.

A value is taken from the command line, else from the file, else it is the default.
"""

import difflib
import json
import re
import shlex
from importlib import resources
from pathlib import Path
from typing import Any, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from aclip.config.recipe import Recipe
from aclip.config.stages import values_of_next_stage
from aclip.errors import ConfigError


def recipe_names() -> list[str]:
    """The names of the recipes that ship with aclip, sorted."""
    folder = resources.files("aclip") / "recipes"
    return sorted(path.name[:-5] for path in folder.iterdir() if path.name.endswith(".yaml"))


def load_recipe(name_or_path: str, overrides: list[str] = ()) -> Recipe:
    """Reads a recipe by its name or a YAML file's path and applies `key.sub=value` overrides.

    Values of overrides are YAML: `loss.simclr=0`, `views.scale=[0.3,1]`, `teacher=null`. Inside of
    a list YAML has braces of its own, so patterns with braces need quotes there.

    Raises:
        ConfigError: there is no such recipe or file, or it is not YAML, a key is unknown (the
            message names the nearest), a value has the wrong type or is out of range, or parts
            contradict each other.
    """
    values = _read_yaml(name_or_path)
    for override in overrides:
        _apply_override(values, override)
    return recipe_of_values(values, name_or_path)


def recipe_of_values(values: dict[str, Any], source: str) -> Recipe:
    """Checks the values of a recipe.

    Args:
        source: where the values come from, for messages.

    Raises:
        ConfigError: as in `load_recipe`.
    """
    _refuse_unknown_keys(values, Recipe, "")
    recipe = _validated(values, source)
    stages_of(recipe, source)
    return recipe


def stages_of(recipe: Recipe, source: str = "the recipe") -> list[Recipe]:
    """The recipe of each stage of a run, in their order; the first is the recipe itself.

    Raises:
        ConfigError: a stage is wrong; says which.
    """
    stages = [recipe]
    while stages[-1].stages:
        number = len(stages) + 1
        changes = stages[-1].stages[0]
        try:
            _refuse_unknown_keys(changes, Recipe, "")
            values = values_of_next_stage(stages[-1].model_dump(mode="json"))
            stages.append(_validated(values, source))
        except ConfigError as error:
            raise ConfigError(f"stage {number} of {source}: {error}") from None
    return stages


def _validated(values: dict[str, Any], source: str) -> Recipe:
    try:
        # As JSON, since pydantic's strict JSON takes a list for a tuple, but no true or '512' for a
        # number.
        return Recipe.model_validate_json(json.dumps(_numbers(values), default=str), strict=True)
    except ValidationError as error:
        raise ConfigError(_describe(error, source)) from None


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML with every default written out; load_recipe reads it back."""
    values = {"description": recipe.description} | recipe.model_dump(mode="json")
    return yaml.safe_dump(values, sort_keys=False)


def _read_yaml(name_or_path: str) -> dict:
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml") or "/" in name_or_path:
        if not path.is_file():
            raise ConfigError(
                f"--recipe is {name_or_path}, but there is no such file; check the path"
            )
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ConfigError(
                f"--recipe is {name_or_path}, which is not a text file; give a YAML file, "
                "such as those in aclip/recipes/"
            ) from None
    elif name_or_path in recipe_names():
        text = (resources.files("aclip") / "recipes" / f"{name_or_path}.yaml").read_text()
    else:
        raise ConfigError(
            f"--recipe is {name_or_path}, which is not a recipe"
            f"{_nearest(name_or_path, recipe_names())}; take one of {', '.join(recipe_names())}, "
            "or a path to a YAML file"
        )
    try:
        values = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ConfigError(
            f"--recipe is {name_or_path}, but it is not YAML: {_one_line(error)}"
        ) from None
    if not isinstance(values, dict):
        raise ConfigError(
            f"--recipe is {name_or_path}, but it does not hold keys and values; give a YAML file "
            "such as those in aclip/recipes/"
        )
    return values


def _apply_override(values: dict, override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator and Path(override).is_file():
        raise ConfigError(
            f"override is {override}, which is a file; put quotes around the pattern of "
            "--train or --val"
        )
    if not separator or not key:
        raise ConfigError(f"override is {override}; write it as key.sub=value")
    value = _value_of(key, text)
    *parents, leaf = key.split(".")
    for parent in parents:
        if isinstance(values, list):  # an item of a list, as in stages.0.train.epochs
            if not parent.isdecimal() or int(parent) >= len(values):
                raise ConfigError(
                    f"override is {override}, but the list before {parent} has {len(values)} "
                    "items, which count from 0"
                )
            parent = int(parent)
        elif values.get(parent) is None:
            values[parent] = {}
        values = values[parent]
        if not isinstance(values, dict | list):
            raise ConfigError(f"override is {override}, but {parent} is a value, not a section")
    if isinstance(values, list):
        raise ConfigError(f"override is {override}, but a list is given whole, as key=[...]")
    # A length replaces the one in other units; a recipe's own epochs are a default behind samples.
    if parents[-1:] == ["train"] and leaf == "epochs":
        values.pop("samples", None)
    elif parents[-1:] == ["train"] and leaf == "samples" and parents[0] == "stages":
        values.pop("epochs", None)
    values[leaf] = value


def _value_of(key: str, text: str) -> Any:
    """The value that an override gives: YAML, where no part of it gets another meaning than a
    newcomer to YAML expects.

    Raises:
        ConfigError: YAML can't read the text, or it would take a part of an unquoted value for a
            comment or for a key. Says how to write it.
    """
    way_out = f"put quotes around it, {_quoted(key, text)}"
    if re.match(r"\s*\[\s*\{\s*\w+:", text):
        way_out = (
            f"""put quotes inside, as {key}='[{{shards: "/data/{{00..99}}.tar", weight: 1}}]'"""
        )
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        reason = getattr(error, "problem", None) or _one_line(error)
        raise ConfigError(f"{key} is {text}, which is not YAML ({reason}); {way_out}") from None
    if not text.lstrip().startswith(("'", '"', "{", "[")):
        if re.search(r"(^|\s)#", text):
            raise ConfigError(f"{key} is {text}, in which YAML takes # for a comment; {way_out}")
        if isinstance(value, dict | list):
            raise ConfigError(f"{key} is {text}, which YAML reads as {value}; {way_out}")
    return value


def _quoted(key: str, text: str) -> str:
    """An override for the shell whose value YAML takes as it stands; a list is quoted by item."""
    text = text.strip()
    items = [text]
    is_list = text.startswith("[") and text.endswith("]")
    if is_list:
        # At commas outside of braces, which are the shards' own.
        parts = re.split(r",(?![^{}]*\})", text[1:-1])
        items = [part.strip().strip("'\"") for part in parts]
    quoted = ", ".join(json.dumps(item, ensure_ascii=False) for item in items)
    value = f"[{quoted}]" if is_list else quoted
    return f"{key}={shlex.quote(value)}"


def _numbers(value: Any) -> Any:
    """Turns `1e-3` and `1e6` into numbers, which they are to everybody but YAML 1.1."""
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
        value = float(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)  # fits both kinds of keys
    return value


def _refuse_unknown_keys(values: dict, part: type[BaseModel], prefix: str) -> None:
    for key, value in values.items():
        field = part.model_fields.get(_today(key, part))
        if field is None:
            known = list(part.model_fields)
            hint = _nearest(key, known, prefix)
            if not prefix and key in _SECTIONS_OF_KEYS:
                hint = f" (did you mean {_SECTIONS_OF_KEYS[key]}.{key}?)"
            raise ConfigError(
                f"{prefix}{key} is not a key of the recipe{hint}; "
                f"known here: {', '.join(prefix + name for name in known)}"
            )
        section = _section_type(field.annotation)
        if section is None:
            continue
        if isinstance(value, dict):
            if get_origin(field.annotation) is list:
                raise ConfigError(
                    f"{prefix}{key} is {value}, but it is a list; give it whole, as "
                    f"{prefix}{key}=[...]"
                )
            _refuse_unknown_keys(value, section, f"{prefix}{key}.")
        for index, item in enumerate(value if isinstance(value, list) else []):
            if isinstance(item, dict):
                _refuse_unknown_keys(item, section, f"{prefix}{key}.{index}.")


def _today(key: str, part: type[BaseModel]) -> str:
    """What a key is called today, where it had another name in older recipes."""
    for name, field in part.model_fields.items():
        if field.validation_alias is not None and key in field.validation_alias.choices:
            return name
    return key


def _section_type(annotation: Any) -> type[BaseModel] | None:
    """The model of a section, or of a list's items."""
    candidates = [annotation, *getattr(annotation, "__args__", ())]
    for candidate in candidates:
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


_SECTIONS_OF_KEYS = {
    key: name
    for name, field in reversed(Recipe.model_fields.items())
    if (section := _section_type(field.annotation))
    for key in section.model_fields
}
"""The section of each key; of several, the first."""


def _describe(error: ValidationError, source: str) -> str:
    first = error.errors()[0]
    # For a value of one of two types, pydantic names the type that it tried behind the field.
    types = ("str", "list[str]", "dict[str, float]")
    field = ".".join(str(part) for part in first["loc"] if part not in types)
    if not field:
        return first["msg"].removeprefix("Value error, ")
    where = f"in {source} or on the command line"
    if first["type"] == "missing":
        return f"{field} is missing from {first['input']!r}; give it {where}"
    message = first["msg"][0].lower() + first["msg"][1:]
    return f"{field} is {first['input']!r}, but {message}; change it {where}"


def _nearest(word: str, known: list[str], prefix: str = "") -> str:
    matches = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" (did you mean {prefix}{matches[0]}?)" if matches else ""


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
