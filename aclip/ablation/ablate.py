"""An ablation from its command line to its report: the work behind launch/ablate.py."""

import argparse
import math
import os
import sys
from pathlib import Path

from aclip.ablation.cases import Case, at_quarters, make_cases
from aclip.ablation.results import read_results
from aclip.ablation.rows import Row, choose_rows, decided_by
from aclip.ablation.rows_file import SUFFIXES, read_rows
from aclip.ablation.runs import Run, Runner, make_runs
from aclip.cli import EXIT_FAILED_RUNS, EXIT_STOPPED_BY_SIGNAL
from aclip.config.ds_config import read_ds_config
from aclip.config.recipe_file import load_recipe
from aclip.data.find_data import find_data
from aclip.data.fingerprint import count_shards
from aclip.errors import ConfigError, NotWritten
from aclip.files import check_writable
from aclip.lock import claim
from aclip.machine import check_gpus, usable_cores
from aclip.nodes.probe import BUSY_MIB, gpus

CAPTION_TOKENS = 17
"""The mean length of a caption, start and end included, for the table's FLOPs."""
LEAST_STEPS = 40
"""With fewer steps, the schedule can't be cut into equal quarters of whole steps."""
DECIDED_HERE = {
    "mask.keep_ratio",
    "train.seed",
    "train.evaluate_every",
    "train.evaluate_at",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.upload_to",
}
"""Keys of the recipe that no override and no row may set."""
LENGTH = {"train.epochs", "train.samples"}
EQUAL_IN_ALL_ROWS = {*LENGTH, "train.global_batch_size"}
"""An override may set them, a row may not, except for the length of a row with stages."""


def ablate(arguments: argparse.Namespace) -> int:
    """Runs `launch/ablate.py` with its parsed arguments; returns the exit status.

    Raises:
        ConfigError: a wrong argument, a row that can't be made of the recipe, no data, no free
            device, an output folder that is in use, can't be written or holds other runs.
        NotWritten: the report, which has been printed, or a run's folder could not be written.
    """
    _check(arguments)
    check_gpus()
    runs = _make_runs(arguments)
    output = Path(arguments.output)
    # Imported here: charts take seconds, which no wrong input should cost.
    from aclip.ablation.report import MARKDOWN, PAGE, make_report, write_files, write_report

    title = f"Ablation {output.name}"

    def report() -> None:
        try:
            write_report(read_results(runs), title, output)
        except NotWritten as error:  # a full disk must not end the runs
            print(f"the report was not written: {error}", flush=True)

    command = [sys.executable, arguments.script, "--ds_config", arguments.ds_config]
    command += ["--recipe", arguments.recipe]
    num_left = sum(not run.is_finished for run in runs)
    devices = _devices(arguments.processes, num_left) if num_left else []
    failed, was_stopped = Runner(command, devices, report).run(runs)
    if any(run.is_finished for run in runs):
        files = make_report(read_results(runs), title)
        print(files[MARKDOWN].decode(), end="", flush=True)  # before a write that can fail
        write_files(files, output)
        print(f"wrote {output / PAGE} and {output / MARKDOWN}", flush=True)
    if was_stopped:
        print("stopped; the same command continues", flush=True)
        return EXIT_STOPPED_BY_SIGNAL
    if failed:
        print(f"{len(failed)} of {len(runs)} runs failed; the same command tries them again")
    return EXIT_FAILED_RUNS if failed else 0


def _make_runs(arguments: argparse.Namespace) -> list[Run]:
    """Every row, keep ratio and seed, checked before the first of them starts."""
    output = Path(arguments.output)
    rows = _choose_rows(arguments)
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    if not recipe.data.train and not recipe.data.sources:
        raise ConfigError(
            f"data.train is empty in {arguments.recipe}; give shards, such as "
            "data.train='/data/*.tar'"
        )
    train = recipe.train
    ds_config = read_ds_config(arguments.ds_config, train.global_batch_size, 1)
    check_writable(output, "--output")
    note = claim(output, "--output", "an ablation")
    if note is not None:
        print(note, flush=True)
    shards, val_shards = find_data(recipe)
    if not val_shards:
        raise ConfigError(
            f"data.val is empty in {arguments.recipe}; give validation shards, on which the rows "
            "are compared"
        )
    dataset_size = sum(shard.num_samples for shard in shards)
    steps = recipe.num_steps(dataset_size)
    if steps < LEAST_STEPS:
        enough = math.ceil(100 * LEAST_STEPS * train.global_batch_size / dataset_size) / 100
        length = "epochs" if train.samples is None else "samples"
        raise ConfigError(
            f"train.{length} is {getattr(train, length):g}, which is {steps} steps, but the rows "
            f"are compared after {LEAST_STEPS} steps at the least; raise train.epochs to "
            f"{enough:g} or more"
        )
    cases = make_cases(rows, arguments.recipe, arguments.overrides, arguments.keep_ratio)
    cases = [_planned(case, dataset_size) for case in cases]
    data = count_shards(recipe.data, shards)
    data["val_samples"] = sum(shard.num_samples for shard in val_shards)
    runs = make_runs(cases, arguments.seeds, output, ds_config.values, data)
    for run in runs:
        run.check()
    return runs


def _check(arguments: argparse.Namespace) -> None:
    if arguments.seeds < 1:
        raise ConfigError(f"--seeds is {arguments.seeds}; give 1 or more")
    if arguments.processes is not None and arguments.processes < 1:
        raise ConfigError(f"--processes is {arguments.processes}; give 1 or more")
    ratios = [f"{ratio:g}" for ratio in arguments.keep_ratio]
    if len(set(ratios)) < len(ratios):
        raise ConfigError(f"--keep_ratio is {' '.join(ratios)}; give each ratio once")


def _choose_rows(arguments: argparse.Namespace) -> list[Row]:
    """The rows that --rows names, whose keys and the user's are apart."""
    names = arguments.rows
    is_file = [Path(name).suffix in SUFFIXES for name in names]
    if any(is_file[1:]):
        raise ConfigError(
            f"--rows names {' '.join(names)}; give one file of rows first, and names of its rows "
            "behind it"
        )
    rows = read_rows(names[0], names[1:]) if is_file[0] else choose_rows(names)
    decided = DECIDED_HERE | (decided_by(rows) - LENGTH)
    for override in arguments.overrides:
        key = override.partition("=")[0]
        if key in decided or (key.startswith("stages.") and "stages" in decided):
            raise ConfigError(
                f"override is {override}, but an ablation decides {key}, by its rows, "
                "--keep_ratio, --seeds or the quarters of the schedule; leave it out"
            )
    for row in rows:
        allowed = set() if row.drops_patches else {"mask.keep_ratio"}
        if "stages" in decided_by([row]):
            allowed |= LENGTH
        for key in sorted(decided_by([row]) & (DECIDED_HERE | EQUAL_IN_ALL_ROWS) - allowed):
            raise ConfigError(
                f"row {row.name} sets {key}, which is equal in all rows; give it on the command "
                "line, or leave it out"
            )
    return rows


def _planned(case: Case, dataset_size: int) -> Case:
    """The case with the points at which its runs are evaluated."""
    # Imported here, since the towers take seconds.
    from aclip.planning.run_flops import RunMeter

    run = RunMeter(case.recipe, CAPTION_TOKENS).run(case.recipe, dataset_size)
    return at_quarters(case, run.samples, run.flops)


def _devices(num_processes: int | None, num_runs: int) -> list[dict[str, str]]:
    """Environment variables that give a process its device: a free GPU, or a share of the cores.

    Args:
        num_processes: how many run at a time; None for as many as there are free devices.

    Raises:
        ConfigError: every GPU is in use, or nvidia-smi, which knows that, is not there.
    """
    listed = gpus()
    if not listed:
        import torch

        if torch.cuda.is_available():
            raise ConfigError("nvidia-smi is not in PATH, so that no free GPU is known; add it")
        num_cores = usable_cores()
        num_processes = num_processes or min(num_cores, num_runs)
        threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, num_cores // num_processes))
        return [{"OMP_NUM_THREADS": threads}] * num_processes
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    allowed = visible.split(",") if visible else [str(index) for index in range(len(listed))]
    # A GPU that is given by its UUID is taken as free.
    busy = {str(index) for index, gpu in enumerate(listed) if gpu["used"] > BUSY_MIB}
    free = [name for name in allowed if name not in busy]
    if not free:
        raise ConfigError(
            f"each of {len(allowed)} GPUs has more than {BUSY_MIB} MiB in use; end what runs there"
        )
    order = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}  # the order in which nvidia-smi counts
    return [order | {"CUDA_VISIBLE_DEVICES": name} for name in free[:num_processes]]
