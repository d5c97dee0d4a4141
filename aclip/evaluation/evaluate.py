"""A model on evaluation sets: the work behind launch/evaluate.py, from its arguments to its status.

What is wrong with the input is said here, before the towers' packages are imported.
"""

import argparse
import importlib.util
import os
from pathlib import Path

from aclip.distributed import decided_by_rank_0, default_to_one_rank, say
from aclip.errors import ConfigError
from aclip.evaluation.origin import find_origin
from aclip.evaluation.results import published_results
from aclip.evaluation.results_folder import ResultsFolder
from aclip.evaluation.sets.catalog import find_tasks
from aclip.evaluation.sets.evaluation_set import EvaluationSet
from aclip.evaluation.sets.task import Task
from aclip.files import check_writable
from aclip.lock import claim, release
from aclip.machine import check_gpus
from aclip.weights.find_named import pinned
from aclip.weights.hub import HUB


def evaluate(arguments: argparse.Namespace) -> int:
    """Runs `launch/evaluate.py` with its parsed arguments; returns the exit status.

    Raises:
        ConfigError: bad input, before any image is read where that can be known.
    """
    default_to_one_rank()
    _check(arguments)
    check_gpus()
    if arguments.checkpoint.startswith(HUB):
        # Rank 0 says for all ranks which commit the name stands for.
        arguments.checkpoint = decided_by_rank_0(
            lambda: _pinned(arguments.checkpoint), "checkpoint"
        )
    origin = find_origin(arguments.checkpoint, arguments.model, arguments.recipe)
    tasks, missing = find_tasks(
        arguments.suite,
        Path(arguments.data) if arguments.data else None,
        arguments.download,
        Path(arguments.slip_checkout) if arguments.slip_checkout else None,
    )
    trains = _open_training_splits(tasks) if arguments.linear_probe else {}
    out = Path(arguments.output) if arguments.output else origin.output
    check_writable(out, "--output")
    is_writer = os.environ["RANK"] == "0"
    if is_writer and (warning := claim(out, "--output", "an evaluation")) is not None:
        say(warning)
    try:
        folder = ResultsFolder(out, origin.identity) if is_writer else None
        # Imported here: the towers' packages take seconds, which no wrong input should cost.
        from aclip.evaluation.evaluate_sets import evaluate_sets

        return evaluate_sets(arguments, tasks, trains, missing, folder)
    finally:
        if is_writer:
            release(out)


def _pinned(checkpoint: str) -> str:
    try:
        return pinned(checkpoint)
    except ValueError as error:
        raise ConfigError(f"the checkpoint is {checkpoint}, which {error}") from None


def _open_training_splits(tasks: list[Task]) -> dict[str, EvaluationSet]:
    """What the linear probes learn from, by the sets' names.

    Raises:
        ConfigError: no set has a training split, or one can't be used.
    """
    if not any(task.train for task in tasks):
        raise ConfigError(
            "--linear_probe needs a training split, which none of the sets has; give one, as "
            "FOLDER/train/CLASS/ beside FOLDER/test/CLASS/"
        )
    for task in tasks:
        if task.train is None:
            task.dataset.notes.append("there is no training split, so no linear probe")
    return {task.name: task.train() for task in tasks if task.train is not None}


def _check(arguments: argparse.Namespace) -> None:
    if arguments.batch_size < 1:
        raise ConfigError(f"--batch_size is {arguments.batch_size}; give a number from 1")
    if arguments.published not in published_results():
        raise ConfigError(
            f"--published is {arguments.published}, which is no row; take one of "
            f"{', '.join(published_results())}"
        )
    if arguments.linear_probe and importlib.util.find_spec("scipy") is None:
        raise ConfigError(
            "--linear_probe needs the package scipy, which is not installed; pip install "
            "-e '.[eval]' in the checkout"
        )
