"""Predicts the time of a step on a GPU that need not be there: `launch/roofline.py`."""

import argparse

from aclip.config.ds_config import DsConfig, read_ds_config
from aclip.config.recipe import Recipe
from aclip.config.recipe_file import load_recipe
from aclip.errors import ConfigError
from aclip.planning.gpus import find_gpu


def roofline(arguments: argparse.Namespace) -> int:
    """Runs `launch/roofline.py` with its parsed arguments; returns the exit status.

    Raises:
        ConfigError: bad input.
    """
    gpu = find_gpu(arguments.gpu)
    if not arguments.caption_tokens >= 2:
        raise ConfigError(f"--caption_tokens is {arguments.caption_tokens:g}; give 2 or more")
    cases = [_read(arguments, size) for size in arguments.batch_sizes]
    # Imported here: the towers' packages take seconds, which no wrong input should cost.
    from aclip.planning.predictions import predict_open_clip, predict_run, report

    predictions = []
    for recipes, ds_config in cases:
        for name, recipe in recipes.items():
            predictions += predict_run(name, recipe, ds_config, gpu, arguments.caption_tokens)
        if arguments.against == "open_clip":
            predictions += predict_open_clip(next(iter(recipes.values())), gpu)
    print(report(predictions))
    return 0


def _read(arguments: argparse.Namespace, batch_size: int) -> tuple[dict[str, Recipe], DsConfig]:
    """The recipes with this batch on one rank, and the ds_config."""
    if batch_size < 2:
        raise ConfigError(f"--batch_sizes has {batch_size}; give 2 or more")
    overrides = [*arguments.set, f"train.global_batch_size={batch_size}"]
    recipes = {name: load_recipe(name, overrides) for name in arguments.recipes}
    ds_config = read_ds_config(arguments.ds_config, batch_size, 1)
    if ds_config.num_micro_steps > 1:
        raise ConfigError(
            f"train_micro_batch_size_per_gpu is {ds_config.micro_batch_size} in {ds_config.path}, "
            f"less than the {batch_size} of --batch_sizes; remove it there"
        )
    return recipes, ds_config
