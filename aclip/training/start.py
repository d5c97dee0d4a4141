"""What a run starts from, checked before anything costs time: DeepSpeed is not even imported."""

import argparse
import os
import secrets
import socket
from dataclasses import dataclass
from pathlib import Path

from aclip.config.arguments import DEMO, read_recipe
from aclip.config.arguments import run_folder as choose_run_folder
from aclip.config.geometry import shared_bytes
from aclip.config.optimizer import check_cooldown, read_ds_configs
from aclip.config.recipe import Recipe
from aclip.config.recipe_file import stages_of
from aclip.config.text_folder import read_text_folder
from aclip.data.find_data import find_data
from aclip.data.fingerprint import check_progress
from aclip.data.loader import build_train_loader, with_crops
from aclip.data.shards.listing import Shard
from aclip.distributed import decided_by_rank_0, default_to_one_rank, say
from aclip.errors import ConfigError
from aclip.evaluation.sets.validation_check import check_validation
from aclip.files import write_whole
from aclip.machine import check_gpus, check_shared_memory, ranks_of_machine
from aclip.run_folder.checkpoint_folder import read_progress
from aclip.run_folder.layout import SHARED_FILE
from aclip.training.metrics.wandb_tracker import check_wandb
from aclip.training.stage import Stage, stage_places
from aclip.training.take_folder import Beginning, take_folder, with_init
from aclip.weights.find_named import check_init


@dataclass(frozen=True)
class Start:
    """What a run starts from, checked.

    Attributes:
        run_folder: the run's folder, which can be written.
        beginning: where the run begins, or goes on.
        stages: what is to be trained, from the stage on in which the run begins or goes on.
    """

    run_folder: Path
    beginning: Beginning
    stages: list[Stage]

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
        is_evaluated = not self.stages[0].val_shards or "end" in progress.get("evaluations", {})
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
    ds_configs = read_ds_configs(arguments.ds_config, stages_of(recipe), num_ranks)
    check_wandb(recipe.train.wandb, is_writer=rank == 0)
    run_folder = choose_run_folder(arguments)

    def take() -> dict:
        allowed = arguments.allow_changes
        return take_folder(run_folder, arguments.resume, recipe, ds_configs[0], allowed)

    beginning = Beginning(**decided_by_rank_0(take, "beginning"))
    if recipe.model.text.name:
        _check_text_folder(recipe)
    recipe = with_init(recipe, beginning.init)
    recipes = stages_of(with_crops(recipe, beginning.crops))[beginning.stage - 1 :]
    keeping = [each for each in recipes if each.keeps_scores]
    if keeping and num_ranks > 1:
        check_shared(run_folder, keeping[0])  # once: rank 0 would write a second word meanwhile
    if beginning.checkpoint is None:
        check_init(recipe.model.init)
        check_locked(recipe)
    if recipe.data.train == DEMO:
        say(
            "This is the demo: a small model on built-in captioned scenes. For your own data: "
            "--recipe aclip_vitb16 --train '/path/*.tar'"
        )
    data = [_check_data(each, rank, num_ranks) for each in recipes]
    sizes = [sum(shard.num_samples for shard in shards) for shards, _ in data]
    stages = [
        Stage(each, ds_config, *found, place)
        for each, ds_config, found, place in zip(
            recipes,
            ds_configs[beginning.stage - 1 :],
            data,
            stage_places(recipes, sizes, beginning.stage, beginning.begun),
            strict=True,
        )
    ]
    for stage in stages:
        check_warmup(stage)
    check_evaluate_at(stages[0])
    start = Start(run_folder, beginning, stages)
    if start.resume_from is not None and not beginning.begins_stage:
        progress = read_progress(start.resume_from)
        if progress is not None:  # else it is damaged, which is said when all of it is verified
            check_progress(recipes[0], stages[0].shards, progress, start.resume_from)
    return start


def check_shared(run_folder: Path, recipe: Recipe) -> None:
    """Refuses a run folder that is another one on this rank than on rank 0, where the teacher's
    scores are kept: what a rank writes, others read. Rank 0 owns the folder already.

    Raises:
        ConfigError: as said.
    """
    path = run_folder / SHARED_FILE

    def mark() -> str:
        token = secrets.token_hex(8)
        write_whole(path, token)
        return token

    token = decided_by_rank_0(mark, "shared")
    try:
        differs = "" if path.read_text() == token else "holds another word"
    except OSError as error:
        differs = f"can't be read: {error.strerror}"
    if differs:
        raise ConfigError(
            f"--output is {run_folder}, which rank {os.environ['RANK']} on {socket.gethostname()} "
            f"does not share with rank 0 (its {path.name} {differs}), but teacher.reuse is "
            f"{recipe.teacher.reuse}, for which all ranks keep scores there; give a folder that "
            "all nodes share, or set teacher.reuse to 1"
        )


def _check_data(recipe: Recipe, rank: int, num_ranks: int) -> tuple[list[Shard], list[Shard]]:
    """A stage's training and validation shards."""
    shards, val_shards = find_data(recipe)
    for sentence in check_validation(val_shards) if val_shards else []:
        say(sentence)
    # Built once before anything costs time, since it checks lanes, ranks and workers.
    loader = build_train_loader(recipe, shards, rank, num_ranks)
    if loader.num_workers:
        ranks_here = ranks_of_machine() or 1
        needed = ranks_here * shared_bytes(recipe, recipe.train.global_batch_size // num_ranks)
        check_shared_memory(needed, f"the data workers of {ranks_here} ranks")
    return shards, val_shards


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


def check_locked(recipe: Recipe) -> None:
    """Refuses a new run whose locked tower would keep random weights."""
    for tower in recipe.optimizer.locked_towers:
        own = recipe.model.text
        starts_in_folder = tower == "text" and own.name and own.pretrained
        if not recipe.model.init and not starts_in_folder:
            raise ConfigError(
                f"optimizer.{tower}.lr_scale is 0, but no --init gives the {tower} tower the "
                "weights that it keeps; give one, or a scale above 0"
            )


def check_warmup(stage: Stage) -> None:
    """Says so where a stage is not longer than its warm-up.

    Raises:
        ConfigError: its cool-down begins before the warm-up is over.
    """
    train, size = stage.recipe.train, sum(shard.num_samples for shard in stage.shards)
    epochs, length = train.epochs, f"train.epochs {train.epochs:g}"
    if train.samples is not None:
        epochs, length = train.samples / size, f"train.samples {train.samples:,}"
    try:
        check_cooldown(stage.recipe, epochs)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if train.warmup_epochs >= epochs:
        number = f" in stage {stage.place.number}" if stage.place.number > 1 else ""
        say(
            f"train.warmup_epochs is {train.warmup_epochs:g} and {length}{number}, so "
            f"the learning rate only rises; set it lower, e.g. to {epochs / 25:g}"
        )


def check_evaluate_at(stage: Stage) -> None:
    """Says so where a run ends before an evaluation that its recipe names."""
    recipe, size = stage.recipe, sum(shard.num_samples for shard in stage.shards)
    steps = recipe.num_steps(size)
    end, _ = stage.place.run_length(steps * recipe.train.global_batch_size, steps)
    late = ", ".join(f"{samples:,}" for samples in recipe.train.evaluate_at if samples > end)
    if late:
        say(
            f"train.evaluate_at names {late} samples, but the run ends after {end:,}, so that it "
            "is not evaluated there"
        )
