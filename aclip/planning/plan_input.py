"""What launch/plan.py is given, checked before the towers' packages, which take seconds, are
imported."""

import argparse
import math
from dataclasses import dataclass

from aclip.config.ds_config import DsConfig
from aclip.config.optimizer import read_ds_configs
from aclip.config.recipe import Recipe
from aclip.config.recipe_file import load_recipe, stages_of
from aclip.errors import ConfigError
from aclip.planning.gpus import Gpu, find_gpu
from aclip.planning.zero_memory import ZeroSettings, zero_settings


@dataclass(frozen=True)
class PlanInput:
    """What a plan is made for.

    Attributes:
        arguments: as parsed; their numbers are in their ranges.
        gpu, recipe, ds_config: what they name.
        settings: what the ds_config says about memory.
    """

    arguments: argparse.Namespace
    gpu: Gpu
    recipe: Recipe
    ds_config: DsConfig
    settings: ZeroSettings

    @property
    def num_ranks(self) -> int:
        return self.arguments.nodes * self.arguments.gpus_per_node


def read_input(arguments: argparse.Namespace) -> list[PlanInput]:
    """Reads what the parsed arguments of `launch/plan.py` name, for each stage of the run.

    Raises:
        ConfigError: a number out of its range, an unknown GPU, a wrong recipe or ds_config.
    """
    _check_numbers(arguments)
    gpu = find_gpu(arguments.gpu)
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    num_ranks = arguments.nodes * arguments.gpus_per_node
    stages = stages_of(recipe)
    ds_configs = read_ds_configs(arguments.ds_config, stages, num_ranks)
    return [
        PlanInput(arguments, gpu, stage, ds_config, zero_settings(ds_config, num_ranks))
        for stage, ds_config in zip(stages, ds_configs, strict=True)
    ]


def _check_numbers(arguments: argparse.Namespace) -> None:
    limits = {
        "nodes": (1, None, "a whole number from 1"),
        "gpus_per_node": (1, None, "a whole number from 1"),
        "mfu": (1e-6, 1, "a share in (0, 1]"),
        "bandwidth": (1e-6, None, "gigabytes a second, above 0"),
        "samples": (1, None, "a number from 1"),
        "image_pixels": (1, None, "a number from 1"),
        "caption_tokens": (2, None, "a number from 2"),
    }
    for name, (low, high, wanted) in limits.items():
        value = getattr(arguments, name)
        if value is not None and not low <= value <= (high or math.inf):
            raise ConfigError(f"--{name} is {value:g}; give {wanted}")
