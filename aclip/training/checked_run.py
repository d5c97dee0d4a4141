"""A run whose input has been checked: the ranks meet, train and end together."""

import gc
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from aclip.cli import EXIT_NON_FINITE, EXIT_NOT_SAVED, EXIT_STOPPED_BY_SIGNAL
from aclip.config.recipe import MaskConfig
from aclip.data.dealing import describe_rests
from aclip.data.find_data import check_same_shards
from aclip.distributed import rank, say, world_size
from aclip.engine.process_group import init_distributed, limit_engine_collectives
from aclip.evaluation.during_training import Evaluator
from aclip.run_folder.checkpoint_folder import folder_at, make_latest
from aclip.run_folder.earlier import set_aside
from aclip.training.begin_stage import check_stages
from aclip.training.checkpoint import CheckpointError
from aclip.training.run_record import record_run
from aclip.training.stage import Stage
from aclip.training.start import Start
from aclip.training.step_watch import NonFiniteLoss
from aclip.training.trainer import Trainer
from aclip.training.watchdog import SAVING, STARTING, Watchdog


def join_ranks(start: Start) -> tuple[torch.device, Watchdog]:
    """Joins the process group, watched from here on; returns this rank's device and its watchdog.

    Raises:
        ConfigError: on every rank, if the ranks see different data.
    """
    first = start.stages[0]
    watchdog = Watchdog(first.recipe.train.hang_timeout)
    watchdog.start()
    device = init_distributed(_collective_timeout(watchdog))
    watchdog.connect()
    for stage in start.stages:
        check_same_shards([*stage.shards, *stage.val_shards])
    return device, watchdog


def train(start: Start, device: torch.device, watchdog: Watchdog) -> tuple[int, Trainer]:
    """Trains the stages of the run, one after the other, and ends together with the other ranks.

    Returns:
        The exit status, and the trainer of the stage that was the last.

    Raises:
        ConfigError: the towers of a stage can't be built or take the weights of the one before; a
            checkpoint, the starting weights or the place of the uploads can't be used.
    """
    resume_from = start.resume_from
    try:
        check_stages(start.stages)
        for stage in start.stages:
            trainer = _build_trainer(start, stage, resume_from, device, watchdog)
            print_headline(stage, trainer, resume_from)
            status = _train_stage(trainer)
            if status or stage.place.is_last:
                return status, trainer
            resume_from = folder_at(trainer.checkpoints, trainer.samples)
            watchdog.enter(STARTING, trainer.step)
            trainer.stepper.engine.destroy()
            trainer = None  # so that the next stage has the device for itself
            _free_memory()
    finally:
        watchdog.stop()


def _build_trainer(
    start: Start,
    stage: Stage,
    resume_from: Path | None,
    device: torch.device,
    watchdog: Watchdog,
) -> Trainer:
    """Builds a stage's trainer, at its checkpoint if there is one, and records what it is made of.

    Args:
        resume_from: a checkpoint of the stage, or the end of the stage before.

    Raises:
        ConfigError: the checkpoint, the starting weights or the place of the uploads can't be used.
    """
    beginning, run_folder = start.beginning, start.run_folder
    is_beginning = stage is start.stages[0]
    is_first = is_beginning and beginning.is_first
    if rank() == 0 and is_first and (earlier := set_aside(run_folder)):
        say(f"{run_folder} holds no checkpoint; what its earlier start told is in {earlier}")
    trainer = Trainer(
        stage,
        run_folder,
        resume_from,
        device,
        begins_stage=not is_beginning or beginning.begins_stage,
        evaluator=Evaluator(stage.recipe, stage.val_shards) if stage.val_shards else None,
        watchdog=watchdog,
    )
    limit_engine_collectives(_collective_timeout(watchdog))
    # A complete run is trained no more, so its records stay.
    if rank() == 0 and not beginning.is_complete:
        if is_beginning and beginning.is_rewind:
            make_latest(trainer.checkpoints, resume_from)
        record_run(
            run_folder,
            stage.recipe,
            stage.ds_config.values,
            trainer.stepper.init_report,
            shards=stage.shards,
            samples=trainer.samples,
            begun=beginning.record if is_beginning else None,
            is_first=is_first,
        )
    return trainer


def print_headline(stage: Stage, trainer: Trainer, resume_from: Path | None) -> None:
    """Prints what is trained, from where, and with which weights."""
    recipe, ds_config, place = stage.recipe, stage.ds_config, stage.place
    precision = str(ds_config.dtype).removeprefix("torch.")
    on_gpu = trainer.device.type == "cuda"
    device = torch.cuda.get_device_name(trainer.device) if on_gpu else "CPU"
    is_alone = place.number == 1 and place.is_last
    say(
        f"{recipe.description or 'recipe'}{'' if is_alone else f', stage {place.number}'}: "
        f"{trainer.num_steps:,} steps of "
        f"{recipe.train.global_batch_size} images on {world_size()} "
        f"rank{'s'[: world_size() > 1]} ({device}, micro-batch "
        f"{ds_config.micro_batch_size} x {ds_config.num_micro_steps}), ZeRO-{ds_config.stage}, "
        f"{precision}; {_kept(recipe.mask)}; run folder {trainer.run_folder}"
    )
    for sentence in describe_rests(recipe, stage.shards):
        say(sentence)
    if resume_from is not None:
        say(f"continuing from {resume_from} at {trainer.samples:,} samples")
    if trainer.stepper.init_report is not None:
        say(trainer.stepper.init_report.summary())


def _kept(mask: MaskConfig) -> str:
    """Which patches the student sees, so that a mask that was forgotten is noticed."""
    end = "" if mask.keep_ratio_end is None else f" to {mask.keep_ratio_end:.4g}"
    share = "all" if mask.policy == "none" else f"{mask.keep_ratio:.4g}{end}"
    return f"each view keeps {share} of its patches (mask.policy {mask.policy})"


def _train_stage(trainer: Trainer) -> int:
    """Trains to the stage's end, waits for uploads and the other ranks; returns the status."""
    status = None
    try:
        status = 0 if trainer.train() else EXIT_STOPPED_BY_SIGNAL
    except (NonFiniteLoss, CheckpointError) as error:
        print(f"[rank {rank()}] error: {error}", flush=True)
        status = EXIT_NON_FINITE if isinstance(error, NonFiniteLoss) else EXIT_NOT_SAVED
    finally:
        trainer.watchdog.enter(SAVING, trainer.step)
        trainer.close()
        if status is not None and world_size() > 1:
            # Rank 0 may still be uploading, and the launcher ends it as soon as another rank ends
            # with an error's status.
            with suppress(RuntimeError):
                dist.barrier()
    if status == EXIT_STOPPED_BY_SIGNAL:
        say(f"stopped by SIGTERM at {trainer.samples:,} samples; the same command continues")
    return status


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _collective_timeout(watchdog: Watchdog) -> timedelta:
    # The watchdog ends a hung run first. This longer limit only counts after it has stopped.
    return timedelta(seconds=2 * watchdog.slow_limit)
