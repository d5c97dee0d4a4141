"""What a run starts from, checked before anything costs time: DeepSpeed is not even imported."""

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

from aclip.config.arguments import DEMO, read_recipe
from aclip.config.arguments import run_folder as choose_run_folder
from aclip.config.ds_config import DsConfig, read_ds_config
from aclip.config.recipe import Recipe
from aclip.data.find_data import find_data
from aclip.data.loader import build_train_loader
from aclip.data.shards.listing import Shard
from aclip.distributed import default_to_one_rank, say
from aclip.errors import ConfigError
from aclip.evaluation.sets.validation_check import check_validation
from aclip.files import check_writable
from aclip.run_folder import checkpoint_folder
from aclip.run_folder.layout import CHECKPOINTS_FOLDER
from aclip.training.metrics.wandb_tracker import check_wandb
from aclip.weights.first_look import check_init


@dataclass(frozen=True)
class Start:
    """What a run starts from, checked.

    Attributes:
        recipe: what to train.
        ds_config: how the ranks share it.
        run_folder: the run's folder, which can be written.
        resume_from: a checkpoint's folder; None for a new run.
        shards, val_shards: training and validation data; the latter may be empty.
    """

    recipe: Recipe
    ds_config: DsConfig
    run_folder: Path
    resume_from: Path | None
    shards: list[Shard]
    val_shards: list[Shard]


def check_start(arguments: argparse.Namespace) -> Start:
    """Checks all input that can be checked without the other ranks and without a tower.

    Raises:
        ConfigError: a wrong argument, recipe or ds_config, a run folder that can't be written, no
            such checkpoint, no data, a validation set that can't be scored, or lanes, ranks and
            workers that do not fit.
    """
    default_to_one_rank()
    rank, num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    recipe = _read_recipe(arguments)
    ds_config = read_ds_config(arguments.ds_config, recipe.train.global_batch_size, num_ranks)
    check_wandb(recipe.train.wandb, is_writer=rank == 0)
    run_folder = choose_run_folder(arguments)
    check_writable(run_folder, "--output")
    resume_from = checkpoint_folder.find(run_folder / CHECKPOINTS_FOLDER, arguments.resume)
    if resume_from is None:
        check_init(recipe.model.init)
    _give_hints(recipe)
    shards, val_shards = find_data(recipe)
    for sentence in check_validation(val_shards) if val_shards else []:
        say(sentence)
    # Built once before anything costs time, since it checks lanes, ranks and workers.
    build_train_loader(recipe, shards, rank, num_ranks)
    return Start(recipe, ds_config, run_folder, resume_from, shards, val_shards)


def _read_recipe(arguments: argparse.Namespace) -> Recipe:
    recipe = read_recipe(arguments)
    if not recipe.data.train and not recipe.data.sources:
        raise ConfigError(
            f"data.train is empty in {arguments.recipe}; give shards with --train, e.g. --train "
            "'/data/yfcc15m/*.tar'"
        )
    return recipe


def _give_hints(recipe: Recipe) -> None:
    if recipe.data.train == DEMO:
        say(
            "This is the demo: a small model on built-in captioned scenes. For your own data: "
            "--recipe aclip_vitb16 --train '/path/*.tar'"
        )
    train = recipe.train
    if train.warmup_epochs >= train.epochs:
        say(
            f"train.warmup_epochs is {train.warmup_epochs:g}, as long as the run: the learning "
            f"rate only rises; set it lower, e.g. to {train.epochs / 25:g}"
        )
