"""What the folder of a run tells of a checkpoint in it, for a card; the rest stays unknown."""

import json
import re
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from aclip.config.arguments import DEMO
from aclip.config.public_values import public_name, public_names, public_text
from aclip.config.recipe import Recipe
from aclip.config.recipe_file import load_recipe
from aclip.config.text_folder import with_recorded_text
from aclip.errors import ConfigError
from aclip.run_folder.checkpoint_folder import read_progress
from aclip.run_folder.layout import (
    METRICS_FILE,
    RECIPE_FILE,
    RESULTS_FILE,
    SHARDS_FILE,
    START_FILE,
    TEXT_FOLDER,
    evaluation_folder,
    later_record,
    later_records,
    picture_path,
)
from aclip.run_folder.metrics_file import read_metrics
from aclip.run_folder.results_file import read_results, scores
from aclip.weights.checkpoint_weights import CheckpointWeights

BUILT_IN = "built-in scenes"
MOST_NAMES = 8
"""Shards of a source that are named one by one."""
BESIDE = "class names and templates beside the shards"


@dataclass(frozen=True)
class Stretch:
    """A part of a run that was trained with one recipe, from `begin` to `end` samples of the run;
    `begin` is None where a run went on from another one's checkpoint and does not say which."""

    recipe: Recipe
    begin: int | None
    end: int


@dataclass(frozen=True)
class Source:
    """What a run read.

    Attributes:
        names: in words, as they can be shown.
        num_samples: how many it holds; None where that is unknown.
        weight: its share of the samples is by this; None where there is one source alone.
    """

    names: list[str]
    num_samples: int | None
    weight: float | None = None


@dataclass(frozen=True)
class Evaluated:
    """A result of the model.

    Attributes:
        set_name: what the set is called in results.json. title: what tables call it.
        kind, metric: see Score.
        num_images: images of the set.
        percent: the number; None where it is undefined.
        prompts: where the class prompts are from, in words; empty for none.
    """

    set_name: str
    title: str
    kind: str
    metric: str
    num_images: int
    percent: float | None
    prompts: str


@dataclass(frozen=True)
class RunFacts:
    """What is known of a checkpoint.

    Attributes:
        samples, steps: that it was trained for. epoch_samples: samples of an epoch of its stage.
            None where the checkpoint has no state.json.
        stretches: the parts of the run up to it, oldest first; none where `samples` is unknown.
        begun_elsewhere: whether its run went on from another run's checkpoint.
        sources: what it read.
        results: of the model itself, at exactly this checkpoint.
        notes: sentences about these results.
        picture: of the kept patches at the checkpoint, where the data are the built-in scenes.
    """

    samples: int | None
    steps: int | None
    epoch_samples: int | None
    stretches: list[Stretch]
    begun_elsewhere: bool
    sources: list[Source]
    results: list[Evaluated]
    notes: list[str]
    picture: Path | None


def read_run(weights: CheckpointWeights) -> RunFacts:
    """Reads what lies in the run folder of a checkpoint.

    Raises:
        ConfigError: a file of the run folder holds something else than it should.
    """
    run_folder = weights.folder.resolve().parent.parent
    progress = read_progress(weights.folder) or {}
    samples = progress.get("samples")
    steps = None
    if samples is not None:
        steps = progress["step"] + progress.get("stage", {}).get("steps", 0)
    results, notes = _evaluations(run_folder, weights, samples)
    picture = None if samples is None else picture_path(run_folder, samples)
    return RunFacts(
        samples=samples,
        steps=steps,
        epoch_samples=progress.get("data", {}).get("samples"),
        stretches=[] if samples is None else _stretches(run_folder, samples),
        begun_elsewhere=_begun_at(run_folder) != 0,
        sources=_sources(run_folder, weights.recipe, progress.get("data", {})),
        results=results,
        notes=notes,
        picture=picture if _is_built_in(weights.recipe) and picture and picture.is_file() else None,
    )


def _is_built_in(recipe: Recipe) -> bool:
    """Whether a run saw nothing but the built-in scenes, in training and evaluation."""
    return recipe.data.train == DEMO and not recipe.data.sources and not recipe.data.val


def _begun_at(run_folder: Path) -> int | None:
    """The samples of the checkpoint of another run that this one began from; 0 for a new run."""
    path = run_folder / START_FILE
    begun = _read_json(path)["checkpoint"] if path.is_file() else None
    if begun is None:
        return 0
    progress = read_progress(Path(begun))
    if progress is not None:
        return progress["samples"]
    in_name = re.fullmatch(r"samples-(\d{12})", Path(begun).name)
    return None if in_name is None else int(in_name[1])


def _stretches(run_folder: Path, samples: int) -> list[Stretch]:
    until = later_record(run_folder, RECIPE_FILE, samples)
    later = [path for path in later_records(run_folder, RECIPE_FILE) if path < until]
    begins = [_begun_at(run_folder), *(int(path.stem.rpartition("-")[2]) for path in later)]
    recipes = [
        with_recorded_text(load_recipe(str(path)), run_folder / TEXT_FOLDER)
        for path in (run_folder / RECIPE_FILE, *later)
    ]
    ends = pairwise([*begins, samples])
    return [Stretch(recipe, *span) for recipe, span in zip(recipes, ends, strict=True)]


def _sources(run_folder: Path, recipe: Recipe, counted: dict[str, Any]) -> list[Source]:
    """What the checkpoint's recipe reads; counts are those of the list of shards, where it is of
    the data that the checkpoint counted."""
    data, whole = recipe.data, counted.get("samples")
    if not data.sources:
        names = [f"the {BUILT_IN} of aclip"] if data.train == DEMO else _quoted(data.train)
        return [Source(names, whole)]
    sizes: Counter[int] = Counter()
    path = run_folder / SHARDS_FILE
    for line in _read_json(path) if path.is_file() else ():
        _, num_samples, source = line.rsplit(" ", 2)
        sizes[int(source)] += int(num_samples)
    is_same = whole is not None and sizes.total() == whole
    return [
        Source(_quoted(each.shards), sizes[index] if is_same else None, each.weight)
        for index, each in enumerate(data.sources)
    ]


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError:
        raise ConfigError(f"{path} is not JSON; put back the run's own file") from None


def _quoted(shards: str | list[str]) -> list[str]:
    names = [f"`{name}`" for name in public_names(shards)]
    more = [f"{len(names) - MOST_NAMES:,} more"] if len(names) > MOST_NAMES else []
    return names[:MOST_NAMES] + more


def _evaluations(
    run_folder: Path, weights: CheckpointWeights, samples: int | None
) -> tuple[list[Evaluated], list[str]]:
    """The results of the model: of the run itself, at the same samples, and of
    launch/evaluate.py."""
    results: list[Evaluated] = []
    if samples is not None and (run_folder / METRICS_FILE).is_file():
        own = [
            line.metrics
            for line in read_metrics(run_folder).evaluations
            if line.samples == samples and line.evaluation == weights.model
        ]
        data = weights.recipe.data
        title = f"{BUILT_IN}, held out"
        if data.val:
            title = f"validation set ({', '.join(public_names(data.val))})"
        for metrics in own[-1:]:
            results += _results("validation", title, "top1", metrics, BESIDE)
    path = evaluation_folder(run_folder, weights.folder.resolve().name, weights.model)
    notes = []
    try:
        entries = read_results(path / RESULTS_FILE)
        for name, entry in entries.items():
            prompts = entry["prompts"] or ""
            prompts = public_name(prompts) if prompts.startswith("/") else public_text(prompts)
            title = public_text(entry["title"])
            results += _results(name, title, entry["metric"], entry["metrics"], prompts)
            notes += [f"{title}: {public_text(note)}" for note in entry["notes"]]
    except (ValueError, LookupError, TypeError) as error:
        raise ConfigError(
            f"{path / RESULTS_FILE} does not hold results of an evaluation ({error}); move it away"
        ) from None
    return results, notes


def _results(
    name: str, title: str, metric: str, metrics: dict[str, float], prompts: str
) -> list[Evaluated]:
    return [
        Evaluated(
            public_name(name),
            title,
            score.kind,
            score.words,
            int(metrics["num_images"]),
            score.percent,
            prompts if score.kind == "zero_shot" else "",
        )
        for score in scores(metric, metrics)
    ]
