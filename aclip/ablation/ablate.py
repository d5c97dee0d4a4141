"""An ablation from its command line to its report: the work behind launch/ablate.py."""

import argparse
import math
import os
import sys
from pathlib import Path

import torch
from filelock import AcquireReturnProxy, FileLock, Timeout

from aclip.ablation.report import MARKDOWN, PAGE, write_report
from aclip.ablation.results import QUARTERS, read_results
from aclip.ablation.rows import Case, choose_rows, make_cases
from aclip.ablation.runs import Runner, make_runs
from aclip.ds_config import read_ds_config
from aclip.errors import ConfigError
from aclip.files import check_writable
from aclip.flops import step_flops
from aclip.models.student import build_student
from aclip.nodes.probe import BUSY_MIB, gpus
from aclip.recipe_file import load_recipe
from aclip.run import find_data
from aclip.schedules import count_steps
from aclip.step_shape import describe_step

CAPTION_TOKENS = 17
"""Of a caption on average, start and end included, for the table's FLOPs."""
LEAST_STEPS = 10
"""With fewer, quarters of them rounded up are not four."""
EXIT_FAILED_RUNS = 1
EXIT_STOPPED_BY_SIGNAL = 143


def ablate(arguments: argparse.Namespace) -> int:
    """Runs `launch/ablate.py` with its parsed arguments; returns the exit status.

    Raises:
        ConfigError: a wrong argument, a row that can't be made of the recipe, no data, no free
            device, an output folder that is in use, can't be written or holds other runs.
    """
    _check(arguments)
    output = Path(arguments.output)
    rows = choose_rows(arguments.rows)
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    if not recipe.data.train and not recipe.data.sources:
        raise ConfigError(
            f"data.train is empty in {arguments.recipe}; give shards, such as "
            "data.train='/data/{00000..01499}.tar'"
        )
    train = recipe.train
    ds_config = read_ds_config(arguments.ds_config, train.global_batch_size, 1)
    check_writable(output)
    shards, val_shards = find_data(recipe, print)
    if not val_shards:
        raise ConfigError(
            f"data.val is empty in {arguments.recipe}; give validation shards, on which the rows "
            "are compared"
        )
    dataset_size = sum(shard.num_samples for shard in shards)
    steps = count_steps(train.epochs, dataset_size, train.global_batch_size)
    if steps < LEAST_STEPS:
        raise ConfigError(
            f"train.epochs is {train.epochs:g}, which is {steps} steps; give {LEAST_STEPS} or more"
        )
    every = math.ceil(steps / QUARTERS) * train.global_batch_size
    schedule = [
        f"train.evaluate_every={every}",
        f"train.checkpoint_every={every}",
        "train.keep_checkpoints=1",
    ]
    overrides = [*arguments.overrides, *schedule]
    cases = make_cases(rows, arguments.recipe, overrides, arguments.keep_ratio)
    data = {"shards": len(shards), "samples": dataset_size}
    runs = make_runs(cases, arguments.seeds, output, ds_config.values, data)
    for run in runs:
        run.check()
    gflops = {case.name: _gflops(case) for case in cases}

    def report() -> None:
        write_report(read_results(runs), gflops, f"Ablation {output.name}", output)

    command = [sys.executable, arguments.script, "--ds_config", arguments.ds_config]
    command += ["--recipe", arguments.recipe]
    devices = _devices(arguments.processes)
    with _only_one(output):
        failed, was_stopped = Runner(command, devices, report).run(runs)
        if any(run.is_finished for run in runs):
            report()
            print((output / MARKDOWN).read_text(), end="")
            print(f"wrote {output / PAGE} and {output / MARKDOWN}", flush=True)
    if was_stopped:
        print("stopped; the same command continues", flush=True)
        return EXIT_STOPPED_BY_SIGNAL
    if failed:
        print(f"{len(failed)} of {len(runs)} runs failed; the same command tries them again")
    return EXIT_FAILED_RUNS if failed else 0


def _check(arguments: argparse.Namespace) -> None:
    if arguments.seeds < 1:
        raise ConfigError(f"--seeds is {arguments.seeds}; give 1 or more")
    if arguments.processes is not None and arguments.processes < 1:
        raise ConfigError(f"--processes is {arguments.processes}; give 1 or more")
    if len(set(arguments.keep_ratio)) < len(arguments.keep_ratio):
        given = " ".join(f"{ratio:g}" for ratio in arguments.keep_ratio)
        raise ConfigError(f"--keep_ratio is {given}; give each ratio once")


def _gflops(case: Case) -> float:
    with torch.device("meta"):
        student = build_student(case.recipe)
    shape = describe_step(case.recipe, student, CAPTION_TOKENS, CAPTION_TOKENS)
    return sum(part.total for part in step_flops(shape).values()) / 1e9


def _devices(num_processes: int | None) -> list[dict[str, str]]:
    """Environment variables that give a process its device: a free GPU, or a share of the cores.

    Raises:
        ConfigError: every GPU is in use.
    """
    listed = gpus()
    if not listed:
        num_cores = len(os.sched_getaffinity(0))
        num_processes = num_processes or num_cores
        threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, num_cores // num_processes))
        return [{"OMP_NUM_THREADS": threads}] * num_processes
    free = [str(index) for index, gpu in enumerate(listed) if gpu["used"] <= BUSY_MIB]
    if not free:
        raise ConfigError(
            f"each of the {len(listed)} GPUs has more than {BUSY_MIB} MiB in use; end what runs on "
            "one of them"
        )
    order = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}  # nvidia-smi's
    return [order | {"CUDA_VISIBLE_DEVICES": gpu} for gpu in free[:num_processes]]


def _only_one(output: Path) -> AcquireReturnProxy:
    """Held while runs are started in the folder."""
    try:
        return FileLock(output / ".lock").acquire(timeout=0)
    except Timeout:
        raise ConfigError(
            f"--output is {output}, in which another ablation is running; wait for it, or give "
            "another folder"
        ) from None
