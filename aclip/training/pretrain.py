"""One pre-training run: checks the inputs, prepares the run folder, trains, prints the results."""

import argparse
import os
import signal
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist

from aclip.cli import EXIT_NON_FINITE, EXIT_NOT_SAVED, EXIT_STOPPED_BY_SIGNAL
from aclip.config.arguments import DEMO, read_recipe
from aclip.config.arguments import run_folder as choose_run_folder
from aclip.config.ds_config import read_ds_config
from aclip.config.recipe import Recipe
from aclip.data.find_data import check_same_shards, find_data
from aclip.data.loader import build_train_loader
from aclip.distributed import default_to_one_rank, rank, world_size
from aclip.errors import ConfigError
from aclip.files import check_writable
from aclip.run_folder import checkpoint_folder
from aclip.run_folder.layout import CHECKPOINTS_FOLDER, picture_path
from aclip.training.run_record import record_run
from aclip.training.wandb_tracker import check_wandb


def pretrain(arguments: argparse.Namespace) -> int:
    """Runs `launch/pretrain.py` with its parsed arguments; returns the exit status."""
    # Until training listens for it: a request for a checkpoint must not end a run that starts.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    default_to_one_rank()
    num_ranks = int(os.environ["WORLD_SIZE"])
    recipe = _read_recipe(arguments)
    ds_config = read_ds_config(arguments.ds_config, recipe.train.global_batch_size, num_ranks)
    check_wandb(recipe.train.wandb, is_writer=os.environ["RANK"] == "0")
    run_folder = choose_run_folder(arguments)
    check_writable(run_folder)
    resume_from = checkpoint_folder.find(run_folder / CHECKPOINTS_FOLDER, arguments.resume)
    say = print if os.environ["RANK"] == "0" else _silent
    if recipe.data.train == DEMO:
        say(
            "This is the demo: a small model on built-in captioned scenes. For your own data: "
            "--recipe aclip_vitb16 --train '/path/*.tar'",
            flush=True,
        )
    train = recipe.train
    if train.warmup_epochs >= train.epochs:
        say(
            f"train.warmup_epochs is {train.warmup_epochs:g}, as long as the run: the learning "
            f"rate only rises; set it lower, e.g. to {train.epochs / 25:g}",
            flush=True,
        )
    shards, val_shards = find_data(recipe)
    # Built once before anything costs time, since it checks lanes, ranks and workers.
    build_train_loader(recipe, shards, int(os.environ["RANK"]), num_ranks)
    # Imported here: DeepSpeed and the towers take seconds, which no wrong input should cost.
    from aclip.engine.process_group import init_distributed, limit_engine_collectives
    from aclip.evaluation.during_training import Evaluator
    from aclip.run_folder.layout import REPORT_PAGE
    from aclip.training import checkpoint
    from aclip.training.step_watch import NonFiniteLoss
    from aclip.training.trainer import Trainer
    from aclip.training.watchdog import SAVING, Watchdog

    watchdog = Watchdog(recipe.train.hang_timeout)
    watchdog.start()
    # The watchdog's limits come first; a collective's own is for when there is none any more.
    collective_timeout = timedelta(seconds=2 * watchdog.slow_limit)
    device = init_distributed(collective_timeout)
    watchdog.connect()
    check_same_shards([*shards, *val_shards])
    trainer = Trainer(
        recipe,
        ds_config,
        shards,
        run_folder,
        resume_from,
        device,
        evaluator=Evaluator(recipe, val_shards, run_folder) if val_shards else None,
        watchdog=watchdog,
    )
    limit_engine_collectives(collective_timeout)
    if rank() == 0:
        record_run(run_folder, recipe, ds_config.values, trainer.stepper.init_report)
    say(_headline(recipe, trainer, ds_config, resume_from, run_folder), flush=True)
    status = None
    try:
        status = 0 if trainer.train() else EXIT_STOPPED_BY_SIGNAL
    except (NonFiniteLoss, checkpoint.CheckpointError) as error:
        print(f"[rank {rank()}] error: {error}", flush=True)
        status = EXIT_NON_FINITE if isinstance(error, NonFiniteLoss) else EXIT_NOT_SAVED
    finally:
        watchdog.enter(SAVING, trainer.step)
        trainer.close()
        if status is not None and world_size() > 1:
            # Rank 0 may have uploaded; the launcher ends it as soon as another rank ends with an
            # error's status.
            with suppress(RuntimeError):
                dist.barrier()
        watchdog.stop()
    if status == EXIT_STOPPED_BY_SIGNAL:
        say(f"stopped by SIGTERM at {trainer.samples:,} samples; the same command continues")
    if status:
        return status
    if trainer.evaluations:
        say(results_table(trainer.evaluations), flush=True)
    say(f"the run is complete: {run_folder}", flush=True)
    figure = picture_path(run_folder, trainer.samples)
    for name, path in (("report", run_folder / REPORT_PAGE), ("figure of kept patches", figure)):
        if path.is_file():
            say(f"{name}: {path}", flush=True)
    return 0


def results_table(evaluations: dict[str, dict]) -> str:
    """Chance, before, student and teacher as a text table, one row per metric, in percent."""
    before, end = evaluations.get("before", {}), evaluations["end"]
    columns = [
        ("chance", end.get("chance", {})),
        ("before", before.get("student", {})),
        ("student", end.get("student", {})),
        ("teacher", end.get("teacher", {})),
    ]
    columns = [(title, values) for title, values in columns if values]
    names = [name for name in end["student"] if not name.startswith("num_")]
    width = max(len(name) for name in names)
    lines = [" " * width + "".join(f"{title:>10}" for title, _ in columns)]
    for name in names:
        cells = (f"{100 * v[name]:9.1f}%" if name in v else " " * 10 for _, v in columns)
        lines.append(f"{name:<{width}}" + "".join(cells))
    return "\n".join(lines)


def _read_recipe(arguments: argparse.Namespace) -> Recipe:
    recipe = read_recipe(arguments)
    if not recipe.data.train and not recipe.data.sources:
        raise ConfigError(
            f"data.train is empty in {arguments.recipe}; give shards with --train, e.g. --train "
            "'/data/yfcc15m/*.tar'"
        )
    return recipe


def _headline(recipe, trainer, ds_config, resume_from, run_folder) -> str:
    precision = str(ds_config.dtype).removeprefix("torch.")
    lines = [
        f"{recipe.description or 'recipe'}: {trainer.num_steps:,} steps of "
        f"{recipe.train.global_batch_size} images on {world_size()} ranks (micro-batch "
        f"{ds_config.micro_batch_size} x {ds_config.num_micro_steps}), ZeRO-{ds_config.stage}, "
        f"{precision}; run folder {run_folder}"
    ]
    if resume_from is not None:
        lines.append(f"continuing from {resume_from} at {trainer.samples:,} samples")
    if trainer.stepper.init_report is not None:
        lines.append(trainer.stepper.init_report.summary())
    return "\n".join(lines)


def _silent(*_, **__) -> None:
    pass
