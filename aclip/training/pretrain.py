"""One pre-training run: checks the inputs, prepares the run folder, trains, prints the results."""

import argparse
import hashlib
import json
import os
import platform
import signal
import socket
import subprocess
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist

from aclip.config.arguments import DEMO, read_recipe
from aclip.config.arguments import run_folder as choose_run_folder
from aclip.config.ds_config import read_ds_config
from aclip.config.recipe import Recipe
from aclip.config.recipe_file import dump_recipe
from aclip.data.demo import ensure_demo_data
from aclip.data.loader import build_train_loader, striding_warnings
from aclip.data.shards.listing import Shard, index_shards, list_shards, remote_shards
from aclip.distributed import rank, world_size
from aclip.errors import ConfigError
from aclip.files import check_writable, write_whole
from aclip.run_folder import checkpoint_folder
from aclip.training.metrics_logger import picture_path
from aclip.training.wandb_tracker import check_wandb

EXIT_NON_FINITE = 3
EXIT_NOT_SAVED = 5
EXIT_STOPPED_BY_SIGNAL = 143


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
    resume_from = checkpoint_folder.find(run_folder / "checkpoints", arguments.resume)
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
    shards, val_shards = find_data(recipe, say)
    # Built once before anything costs time, since it checks lanes, ranks and workers.
    build_train_loader(recipe, shards, int(os.environ["RANK"]), num_ranks)
    # Imported here: DeepSpeed and the towers take seconds, which no wrong input should cost.
    from aclip.engine.build import init_distributed, limit_engine_collectives
    from aclip.evaluation.during_training import Evaluator
    from aclip.reports.report import PAGE
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
    _check_same_shards([*shards, *val_shards])
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
        _record(run_folder, recipe, ds_config.values, trainer.stepper.init_report)
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
    for name, path in (("report", run_folder / PAGE), ("figure of kept patches", figure)):
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


def find_data(recipe: Recipe, say) -> tuple[list[Shard], list[Shard]]:
    """The training and the validation shards; makes the demo's on first use.

    Args:
        say: gets lines for the user, as print.

    Raises:
        ConfigError: shards are missing, or can't be read or counted.
    """
    train, val = recipe.data.train, recipe.data.val
    if train == DEMO:
        demo = ensure_demo_data(say)
        train, val = demo.train, val or demo.val
    remote = remote_shards(recipe.data)

    def find(pattern, field: str) -> list[Shard]:
        return index_shards(list_shards(pattern, field), say, remote)

    if not recipe.data.sources:
        shards = find(train, "data.train")
    else:
        shards = [
            replace(shard, source=index)
            for index, source in enumerate(recipe.data.sources)
            for shard in find(source.shards, f"data.sources.{index}.shards")
        ]
    for warning in striding_warnings(recipe, shards):
        say(f"warning: {warning}", flush=True)
    return shards, find(val, "data.val") if val else []


def _check_same_shards(shards: list[Shard]) -> None:
    """Refuses data that differ between ranks: they would take samples twice and leave out others.

    Raises:
        ConfigError: on every rank.
    """
    if world_size() == 1:
        return
    content = "\n".join(f"{s.url} {s.num_samples} {s.source}" for s in shards)
    samples = sum(shard.num_samples for shard in shards)
    mine = (hashlib.sha256(content.encode()).hexdigest(), len(shards), samples)
    every: list[tuple[str, int, int]] = [mine] * world_size()
    dist.all_gather_object(every, mine)
    for other, seen in enumerate(every):
        if seen[0] != every[0][0]:
            raise ConfigError(
                f"data.train and data.val give {every[0][1]} shards with {every[0][2]} samples on "
                f"rank 0, but {seen[1]} with {seen[2]} on rank {other}; let all nodes see the same "
                "shards and sizes.json"
            )


def _record(run_folder: Path, recipe: Recipe, ds_values: dict, init_report) -> None:
    """Writes what the run was made of: recipe, ds_config, versions, git commit, first weights."""
    packages = ("torch", "deepspeed", "timm", "transformers", "open_clip_torch", "triton")
    environment = {
        "python": platform.python_version(),
        "host": socket.gethostname(),
        "ranks": world_size(),
        "packages": {name: version(name) for name in packages},
        "git_commit": _git_commit(),
    }
    records = {"ds_config.json": ds_values, "environment.json": environment}
    if init_report is not None:
        records["init_report.json"] = init_report.to_dict()
    write_whole(run_folder / "recipe.yaml", dump_recipe(recipe).encode())
    for name, values in records.items():
        write_whole(run_folder / name, json.dumps(values, indent=2).encode())


def _git_commit() -> str | None:
    source = Path(__file__).resolve().parent
    try:
        result = subprocess.run(
            ["git", "-C", source, "rev-parse", "HEAD"], capture_output=True, text=True
        )
    except FileNotFoundError:
        return None
    return result.stdout.strip() or None


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


def default_to_one_rank() -> None:
    """Without a launcher the script is its own single rank."""
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("LOCAL_RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if "MASTER_PORT" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(probe.getsockname()[1])
    if "OMP_NUM_THREADS" not in os.environ:
        # Ranks that share cores lose far more to contention than they gain from threads.
        ranks_here = int(os.environ.get("LOCAL_SIZE") or os.environ["WORLD_SIZE"])
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks_here))


def _silent(*_, **__) -> None:
    pass
