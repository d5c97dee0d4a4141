"""One set after the other. They do not depend on each other: what a set gives is printed and
written before the next one begins, and what goes wrong costs that set, or that file."""

import argparse
import os
import traceback

import torch

from aclip import distributed
from aclip.cli import EXIT_FAILED_RUNS, EXIT_NOT_SAVED
from aclip.distributed import say
from aclip.errors import ConfigError
from aclip.evaluation.class_cache import ClassCache
from aclip.evaluation.evaluate_set import check_scored, evaluate_set
from aclip.evaluation.linear_probe import linear_probe
from aclip.evaluation.load_model import LoadedModel, load_model
from aclip.evaluation.progress import SpokenProgress
from aclip.evaluation.results import table
from aclip.evaluation.results_folder import ResultsFolder
from aclip.evaluation.sets.evaluation_set import EvaluationSet
from aclip.evaluation.sets.task import Task
from aclip.evaluation.towers import Towers
from aclip.files import cache_folder


def evaluate_sets(
    arguments: argparse.Namespace,
    tasks: list[Task],
    trains: dict[str, EvaluationSet],
    missing: list[str],
    folder: ResultsFolder | None,
) -> int:
    """Loads the model, evaluates the sets and reports; returns the exit status.

    Args:
        arguments: of `launch/evaluate.py`, checked.
        tasks: the sets.
        trains: by a set's name, what a linear probe learns from.
        missing: sentences about sets that are not there.
        folder: takes the results; None on every rank but rank 0, which alone has a status to give.

    Raises:
        ConfigError: the model can't be loaded.
    """
    loaded = load_model(arguments.checkpoint, arguments.model, arguments.recipe)
    towers = loaded.towers(_join_ranks())
    world_size = distributed.world_size()
    say(
        f"evaluating the {loaded.description} at {towers.resolution} px on {len(tasks)} "
        f"set{'s'[: len(tasks) > 1]}, {world_size} rank{'s'[: world_size > 1]}"
    )
    if missing:
        say(
            f"--data is {arguments.data}, which lacks {len(missing)} of the paper's sets; they are "
            "left out, and results.md says where each is expected"
        )
    facts = {
        "model": loaded.description,
        "resolution": towers.resolution,
        "ranks": world_size,
        "left_out": missing,
    }
    not_written = None if folder is None else folder.not_written
    cache = ClassCache(cache_folder() / "class_embeds", loaded.student, not_written)
    for task in tasks:
        metrics = _score(arguments, task, towers, cache, folder)
        if metrics is not None and task.name in trains:
            metrics |= _probe(arguments, task, trains[task.name], loaded, towers, folder)
        if folder is None:
            continue
        if metrics is not None:
            said = folder.add(task, metrics)
            rows = folder.rows(arguments.published, task.name)
            say(f"{table(rows, arguments.published)}\n{said}")
        folder.write(facts, arguments.published)
    return 0 if folder is None else _finish(folder, arguments.published)


def _join_ranks() -> torch.device:
    """This rank's device, after joining the launcher's process group if there are more ranks."""
    if int(os.environ["WORLD_SIZE"]) > 1:
        # Imported here: DeepSpeed takes seconds, which one rank need not wait for.
        from aclip.engine.process_group import init_distributed

        return init_distributed()
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _score(
    arguments: argparse.Namespace,
    task: Task,
    towers: Towers,
    cache: ClassCache,
    folder: ResultsFolder | None,
) -> dict[str, float] | None:
    """The metrics of zero-shot and retrieval; None where the set can't be scored."""
    progress, size = SpokenProgress(task.name), arguments.batch_size
    try:
        metrics = evaluate_set(towers, task.dataset, task.prompts, size, cache.embed, progress)
        check_scored(metrics, "--suite", f"{task.name} ({task.source})")
        if metrics.get("num_classes") == 1:
            task.dataset.notes.append("there is one class alone, so any model names it")
        if metrics["num_images"] == 1 and "num_captions" in metrics:
            task.dataset.notes.append("there is one image alone, so any model finds it")
    except Exception as error:  # see _fail
        _fail(task.name, error, folder)
        return None
    return metrics


def _probe(
    arguments: argparse.Namespace,
    task: Task,
    train: EvaluationSet,
    loaded: LoadedModel,
    towers: Towers,
    folder: ResultsFolder | None,
) -> dict[str, float]:
    """The metrics of the linear probe; none where it fails."""
    progress, size, encode = SpokenProgress(task.name), arguments.batch_size, loaded.student.image
    try:
        return linear_probe(towers, encode, train, task.dataset, size, progress)
    except Exception as error:  # see _fail
        _fail(f"{task.name}, linear probe", error, folder)
        return {}


def _fail(name: str, error: Exception, folder: ResultsFolder | None) -> None:
    """Says and remembers why a part of the evaluation has no result.

    A ConfigError is the same on every rank. Any other error is not foreseen, and may come from a
    set's files or from a library: it too must not cost the other sets, as long as no other rank
    waits for this one.
    """
    sentence = str(error)
    if not isinstance(error, ConfigError):
        if distributed.world_size() > 1:
            raise error
        traceback.print_exception(error)
        sentence = f"{type(error).__name__}: {sentence}"
    say(f"error: {name} was not evaluated: {sentence}")
    if folder is not None:
        folder.failed[name] = sentence


def _finish(folder: ResultsFolder, published: str) -> int:
    """Prints all results of the model and how it went; returns the exit status."""
    if len(folder.entries) > 1:
        say(f"all results:\n{table(folder.rows(published), published)}")
    for name, sentence in folder.failed.items():
        say(f"not evaluated: {name}: {sentence}")
    written = [path for path in folder.paths if path not in folder.unwritten]
    if written:
        say(f"written: {', '.join(map(str, written))}")
    for sentence in folder.unwritten.values():
        say(f"not written: {sentence}")
    if folder.failed:
        return EXIT_FAILED_RUNS
    return EXIT_NOT_SAVED if folder.unwritten else 0
