"""What a run starts from, checked before anything costs time: DeepSpeed is not even imported."""

import argparse
import os
import socket
from dataclasses import dataclass
from pathlib import Path

from aclip.config.arguments import DEMO, read_recipe
from aclip.config.arguments import run_folder as choose_run_folder
from aclip.config.ds_config import DsConfig, read_ds_config
from aclip.config.geometry import shared_bytes
from aclip.config.recipe import Recipe
from aclip.config.text_folder import read_text_folder
from aclip.data.find_data import find_data
from aclip.data.fingerprint import check_progress
from aclip.data.loader import build_train_loader, with_crops
from aclip.data.shards.listing import Shard
from aclip.distributed import decided_by_rank_0, default_to_one_rank, say
from aclip.errors import ConfigError
from aclip.evaluation.sets.validation_check import check_validation
from aclip.machine import check_gpus, check_shared_memory
from aclip.run_folder.checkpoint_folder import read_progress
from aclip.training.metrics.wandb_tracker import check_wandb
from aclip.training.take_folder import Beginning, check_shared, take_folder
from aclip.weights.first_look import check_init


@dataclass(frozen=True)
class Start:
    """What a run starts from, checked.

    Attributes:
        recipe: what to train.
        ds_config: how the ranks share it.
        run_folder: the run's folder, which can be written.
        beginning: where the run begins, or goes on.
        shards, val_shards: training and validation data; the latter may be empty.
    """

    recipe: Recipe
    ds_config: DsConfig
    run_folder: Path
    beginning: Beginning
    shards: list[Shard]
    val_shards: list[Shard]

    @property
    def resume_from(self) -> Path | None:
        """A checkpoint's folder; None for a new run."""
        found = self.beginning.checkpoint
        return None if found is None else Path(found)

    @property
    def reached(self) -> dict | None:
        """state.json of a run that was complete before, with nothing left to do; else None."""
        if not self.beginning.is_complete:
            return None
        progress = read_progress(self.resume_from)
        is_evaluated = not self.val_shards or "end" in progress.get("evaluations", {})
        return progress if is_evaluated else None


def check_start(arguments: argparse.Namespace) -> Start:
    """Checks all input that can be checked without the other ranks and without a tower.

    Raises:
        ConfigError: a wrong argument, recipe or ds_config, a run folder that can't be written, is
            in use, holds a run with other settings or should be shared by the ranks and is not, no
            such checkpoint, no data, a validation set that can't be scored, or lanes, ranks and
            workers that do not fit.
    """
    default_to_one_rank()
    check_gpus()
    rank, num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    recipe = _read_recipe(arguments)
    ds_config = read_ds_config(arguments.ds_config, recipe.train.global_batch_size, num_ranks)
    check_wandb(recipe.train.wandb, is_writer=rank == 0)
    run_folder = choose_run_folder(arguments)

    def take() -> dict:
        return take_folder(run_folder, arguments.resume, recipe, ds_config, arguments.allow_changes)

    beginning = Beginning(**decided_by_rank_0(take, "beginning"))
    if recipe.model.text.name:
        _check_text_folder(recipe)
    if recipe.keeps_scores and num_ranks > 1:
        check_shared(run_folder, recipe)
    if beginning.checkpoint is None:
        check_init(recipe.model.init)
    recipe = with_crops(recipe, beginning.crops)
    _give_hints(recipe)
    shards, val_shards = find_data(recipe)
    for sentence in check_validation(val_shards) if val_shards else []:
        say(sentence)
    # Built once before anything costs time, since it checks lanes, ranks and workers.
    loader = build_train_loader(recipe, shards, rank, num_ranks)
    if loader.num_workers:
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
        needed = ranks_here * shared_bytes(recipe, recipe.train.global_batch_size // num_ranks)
        check_shared_memory(needed, f"the data workers of {ranks_here} ranks")
    start = Start(recipe, ds_config, run_folder, beginning, shards, val_shards)
    if start.resume_from is not None:
        progress = read_progress(start.resume_from)
        if progress is not None:  # else it is damaged, which is said when all of it is verified
            check_progress(recipe, shards, progress, start.resume_from)
    return start


def _check_text_folder(recipe: Recipe) -> None:
    """Refuses a text tower's folder that differs from rank 0's: each rank reads its own node's.

    Raises:
        ConfigError: as said, or see read_text_folder.
    """
    of_rank_0 = decided_by_rank_0(lambda: read_text_folder(recipe.model.text).digest(), "text")
    if read_text_folder(recipe.model.text).digest() != of_rank_0:
        raise ConfigError(
            f"model.text.name is {recipe.model.text.name}, which holds other files on "
            f"{socket.gethostname()} than on rank 0's node; copy that folder there"
        )


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
            f"train.warmup_epochs is {train.warmup_epochs:g} and train.epochs {train.epochs:g}, so "
            f"the learning rate only rises; set it lower, e.g. to {train.epochs / 25:g}"
        )
