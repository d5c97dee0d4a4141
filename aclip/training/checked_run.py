"""A run whose input has been checked: the ranks meet, train and end together."""

from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist

from aclip.cli import EXIT_NON_FINITE, EXIT_NOT_SAVED, EXIT_STOPPED_BY_SIGNAL
from aclip.data.dealing import describe_rests
from aclip.data.find_data import check_same_shards
from aclip.distributed import rank, say, world_size
from aclip.engine.process_group import init_distributed, limit_engine_collectives
from aclip.evaluation.during_training import Evaluator
from aclip.run_folder.checkpoint_folder import make_latest
from aclip.run_folder.earlier import set_aside
from aclip.training.checkpoint import CheckpointError
from aclip.training.run_record import record_run
from aclip.training.start import Start
from aclip.training.step_watch import NonFiniteLoss
from aclip.training.trainer import Trainer
from aclip.training.watchdog import SAVING, Watchdog


def join_ranks(start: Start) -> tuple[torch.device, Watchdog]:
    """Joins the process group, watched from here on; returns this rank's device and its watchdog.

    Raises:
        ConfigError: on every rank, if the ranks see different data.
    """
    watchdog = Watchdog(start.recipe.train.hang_timeout)
    watchdog.start()
    device = init_distributed(_collective_timeout(watchdog))
    watchdog.connect()
    check_same_shards([*start.shards, *start.val_shards])
    return device, watchdog


def build_trainer(start: Start, device: torch.device, watchdog: Watchdog) -> Trainer:
    """Builds the trainer, at its checkpoint if there is one, and records what the run is made of.

    Raises:
        ConfigError: the checkpoint, the starting weights or the place of the uploads can't be used.
    """
    beginning = start.beginning
    if rank() == 0 and beginning.is_first and (earlier := set_aside(start.run_folder)):
        say(f"{start.run_folder} holds no checkpoint; what its earlier start told is in {earlier}")
    trainer = Trainer(
        start.recipe,
        start.ds_config,
        start.shards,
        start.run_folder,
        start.resume_from,
        device,
        evaluator=Evaluator(start.recipe, start.val_shards) if start.val_shards else None,
        watchdog=watchdog,
    )
    limit_engine_collectives(_collective_timeout(watchdog))
    # A complete run is trained no more, so its records stay.
    if rank() == 0 and not beginning.is_complete:
        if beginning.is_rewind:
            make_latest(trainer.checkpoints, start.resume_from)
        record_run(
            start.run_folder,
            start.recipe,
            start.ds_config.values,
            trainer.stepper.init_report,
            shards=start.shards,
            samples=trainer.samples,
            begun=beginning.record,
            is_first=beginning.is_first,
        )
    return trainer


def print_headline(start: Start, trainer: Trainer) -> None:
    """Prints what is trained, from where, and with which weights."""
    recipe, ds_config = start.recipe, start.ds_config
    precision = str(ds_config.dtype).removeprefix("torch.")
    on_gpu = trainer.device.type == "cuda"
    device = torch.cuda.get_device_name(trainer.device) if on_gpu else "CPU"
    say(
        f"{recipe.description or 'recipe'}: {trainer.num_steps:,} steps of "
        f"{recipe.train.global_batch_size} images on {world_size()} "
        f"rank{'s'[: world_size() > 1]} ({device}, micro-batch "
        f"{ds_config.micro_batch_size} x {ds_config.num_micro_steps}), ZeRO-{ds_config.stage}, "
        f"{precision}; run folder {start.run_folder}"
    )
    for sentence in describe_rests(recipe, start.shards):
        say(sentence)
    if start.resume_from is not None:
        say(f"continuing from {start.resume_from} at {trainer.samples:,} samples")
    if trainer.stepper.init_report is not None:
        say(trainer.stepper.init_report.summary())


def train(trainer: Trainer) -> int:
    """Trains to the end, waits for uploads and for the other ranks; returns the exit status."""
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
        trainer.watchdog.stop()
    if status == EXIT_STOPPED_BY_SIGNAL:
        say(f"stopped by SIGTERM at {trainer.samples:,} samples; the same command continues")
    return status


def _collective_timeout(watchdog: Watchdog) -> timedelta:
    # The watchdog ends a hung run first. This longer limit only counts after it has stopped.
    return timedelta(seconds=2 * watchdog.slow_limit)
