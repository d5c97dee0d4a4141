"""What launch/benchmark.py is given for the cost of steps, checked before DeepSpeed and the towers'
packages, which take seconds, are imported."""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch

from aclip.config.recipe import Recipe
from aclip.config.recipe_file import load_recipe
from aclip.errors import ConfigError


@dataclass(frozen=True)
class StepInput:
    """What is timed.

    Attributes:
        arguments: as parsed.
        recipes: by name, in their order.
        baseline: the name of the recipe that counts as 1.
        batch_size: images of a step.
    """

    arguments: argparse.Namespace
    recipes: dict[str, Recipe]
    baseline: str
    batch_size: int


def read_input(arguments: argparse.Namespace) -> StepInput:
    """Reads what the parsed arguments of `launch/benchmark.py` name.

    Raises:
        ConfigError: a number out of its range, no folder for --json, a wrong recipe, a baseline
            that is not among them.
    """
    for name, least in (("rounds", 1), ("threads", 1), ("batch_size", 2)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name} is {value}; give {least} or more")
    if arguments.json and not Path(arguments.json).absolute().parent.is_dir():
        raise ConfigError(f"--json is {arguments.json}, whose folder is not there; make it first")
    batch_size = arguments.batch_size or (128 if torch.cuda.is_available() else 8)
    overrides = [*arguments.set, f"train.global_batch_size={batch_size}", "data.train=demo"]
    recipes = {name: load_recipe(name, overrides) for name in arguments.recipes}
    baseline = arguments.baseline or arguments.recipes[0]
    if baseline not in recipes:
        raise ConfigError(f"--baseline is {baseline}, which is not among {', '.join(recipes)}")
    return StepInput(arguments, recipes, baseline, batch_size)
