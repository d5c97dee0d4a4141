"""A model on evaluation sets: the work behind launch/evaluate.py."""

import argparse
import os
import time
from pathlib import Path

import torch

from aclip import distributed
from aclip.distributed import default_to_one_rank, say
from aclip.errors import ConfigError
from aclip.evaluation.class_cache import ClassCache
from aclip.evaluation.evaluate_set import evaluate_set
from aclip.evaluation.load_model import LoadedModel, load_model
from aclip.evaluation.results import make_rows, markdown, published_results, table, to_json
from aclip.evaluation.sets.catalog import find_tasks
from aclip.evaluation.sets.prompts import CLASS_NAMES_FILE
from aclip.evaluation.sets.task import Task
from aclip.evaluation.towers import Towers
from aclip.files import cache_folder, check_writable, write_whole

PROGRESS_SECONDS = 5


def evaluate(arguments: argparse.Namespace) -> None:
    """Runs `launch/evaluate.py` with its parsed arguments.

    Raises:
        ConfigError: bad input, before any image is read where that can be known.
    """
    default_to_one_rank()
    if arguments.batch_size < 1:
        raise ConfigError(f"--batch_size is {arguments.batch_size}; give a number from 1")
    if arguments.published not in published_results():
        raise ConfigError(
            f"--published is {arguments.published}, which is no row; take one of "
            f"{', '.join(published_results())}"
        )
    out = Path(arguments.output)
    check_writable(out, "--output")
    tasks, missing = find_tasks(
        arguments.suite,
        Path(arguments.data) if arguments.data else None,
        arguments.download,
        Path(arguments.slip_checkout) if arguments.slip_checkout else None,
    )
    if arguments.linear_probe and not any(task.train for task in tasks):
        raise ConfigError(
            "--linear_probe needs a training split, which none of the sets has; give one, as "
            "FOLDER/train/CLASS/ beside FOLDER/test/CLASS/"
        )
    loaded = load_model(arguments.checkpoint, arguments.model, arguments.recipe)
    device = _join_ranks()
    towers = loaded.towers(device)
    say(_headline(loaded, tasks, missing))
    cache = ClassCache(cache_folder() / "class_embeds", loaded.student)
    results = []
    for task in tasks:
        progress = _Progress(task.name)
        size = arguments.batch_size
        metrics = evaluate_set(towers, task.dataset, task.prompts, size, cache.embed, progress)
        if not any(name.startswith(("zero_shot", "image_to_text")) for name in metrics):
            raise ConfigError(
                f"--suite is {task.name}, whose {task.source} holds neither captions nor labels "
                f"with names; write {CLASS_NAMES_FILE} beside the shards' folder"
            )
        if arguments.linear_probe and task.train is not None:
            metrics |= _probe(loaded, towers, task, size, progress)
        results.append((task, metrics))
    if distributed.rank() == 0:
        _report(arguments, loaded, results, missing, out)


def _probe(loaded: LoadedModel, towers: Towers, task: Task, size: int, progress) -> dict:
    from aclip.evaluation.linear_probe import linear_probe

    encode = loaded.student.image
    return linear_probe(towers, encode, task.train(), task.dataset, size, progress)


def _join_ranks() -> torch.device:
    """This rank's device, after joining the launcher's process group if there are more ranks."""
    if int(os.environ["WORLD_SIZE"]) > 1:
        # Imported here: DeepSpeed takes seconds, which one rank need not wait for.
        from aclip.engine.process_group import init_distributed

        return init_distributed()
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _headline(loaded: LoadedModel, tasks: list[Task], missing: list[str]) -> str:
    lines = [
        f"evaluating the {loaded.description} at {loaded.recipe.model.image.resolution} px on "
        f"{len(tasks)} sets, {distributed.world_size()} ranks"
    ]
    return "\n".join(lines + [f"left out: {sentence}" for sentence in missing])


def _report(
    arguments: argparse.Namespace,
    loaded: LoadedModel,
    results: list[tuple[Task, dict[str, float]]],
    missing: list[str],
    out: Path,
) -> None:
    rows = make_rows(results, arguments.published)
    facts = [
        f"{task.title}: {int(metrics['num_images']):,} images of {task.source}, "
        f"{int(metrics['num_skipped'])} unusable"
        + ("" if task.prompts is None else f"; prompts: {task.prompts.source}")
        for task, metrics in results
    ]
    facts += [f"left out: {sentence}" for sentence in missing]
    values = {
        "model": loaded.description,
        "resolution": loaded.recipe.model.image.resolution,
        "ranks": distributed.world_size(),
        "published": arguments.published,
        "sets": {
            task.name: {
                "title": task.title,
                "metric": task.metric,
                "source": task.source,
                "prompts": None if task.prompts is None else task.prompts.source,
                "metrics": metrics,
            }
            for task, metrics in results
        },
        "left_out": missing,
    }
    write_whole(out / "results.json", to_json(values).encode())
    text = markdown(f"Evaluation of the {loaded.description}", rows, arguments.published, facts)
    write_whole(out / "results.md", text.encode())
    say(table(rows, arguments.published))
    say("\n".join(facts))
    say(f"written: {out / 'results.json'}, {out / 'results.md'}")


class _Progress:
    """Prints what a set's evaluation has done, every few seconds and at the end of each part."""

    def __init__(self, name: str):
        self._name = name
        self._next = time.monotonic() + PROGRESS_SECONDS

    def __call__(self, words: str, done: int, total: int) -> None:
        now = time.monotonic()
        if now < self._next and done < total:
            return
        self._next = now + PROGRESS_SECONDS
        share = f": {done:,} of {total:,} on this rank" if total > 1 else ""
        say(f"{self._name}, {words}{share}")
