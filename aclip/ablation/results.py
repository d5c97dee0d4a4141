"""What finished runs reached: means over seeds with their standard errors."""

import math
import statistics
from dataclasses import dataclass

from aclip.ablation.cases import Case
from aclip.ablation.runs import Run
from aclip.config.recipe_file import stages_of
from aclip.errors import ConfigError
from aclip.run_folder.metrics_file import StepLine, read_metrics

METRICS = ("zero_shot_top1", "image_to_text_r1")
"""The first of them that the validation set allows is compared."""
OBJECTS = "object_patches_kept"


@dataclass(frozen=True)
class Mean:
    """The mean over several seeds and its standard error, which is NaN for one seed."""

    value: float
    error: float

    @staticmethod
    def of(values: list[float]) -> "Mean":
        spread = statistics.stdev(values) if len(values) > 1 else math.nan
        return Mean(statistics.fmean(values), spread / math.sqrt(len(values)))


@dataclass(frozen=True)
class Outcome:
    """What one run reached.

    Attributes:
        metric: the metric's name.
        points: the student's values at 0, 25, 50, 75 and 100 % of the run.
        samples: how many samples the run had seen at these points.
        objects: the share of the objects' patches that the mask kept at those of them at which
            there was one; empty if unknown.
        seconds: what the steps took, by each stage's median of the log steps.
    """

    metric: str
    points: list[float]
    samples: list[int]
    objects: list[float]
    seconds: float


@dataclass(frozen=True)
class Result:
    """A case and the outcomes of its finished runs, by seed."""

    case: Case
    outcomes: dict[int, Outcome]

    def accuracy(self) -> list[Mean]:
        """The means at 25, 50, 75 and 100 % of the run."""
        each = [outcome.points[1:] for outcome in self.outcomes.values()]
        return [Mean.of(list(values)) for values in zip(*each, strict=True)]

    def objects(self) -> list[Mean]:
        """Share of the objects' patches that the mask keeps, untrained and at the end; or []."""
        each = [[o.objects[0], o.objects[-1]] for o in self.outcomes.values() if o.objects]
        return [Mean.of(list(values)) for values in zip(*each, strict=True)]

    def seconds(self) -> float:
        return statistics.median(outcome.seconds for outcome in self.outcomes.values())


def read_results(runs: list[Run]) -> list[Result]:
    """The cases that have finished runs, in the order of the rows.

    Raises:
        ConfigError: a run's metrics are not there, or not whole.
    """
    results: dict[str, Result] = {}
    for run in runs:
        if run.is_finished:
            result = results.setdefault(run.case.name, Result(run.case, {}))
            result.outcomes[run.seed] = _read(run)
    return list(results.values())


def difference(better: Result, worse: Result) -> list[Mean]:
    """The differences of the accuracies at 25, 50, 75 and 100 %, taken seed by seed.

    A seed fixes the first weights, the order of the samples and the boxes of their views, so that
    much of the spread cancels.
    """
    seeds = better.outcomes.keys() & worse.outcomes.keys()
    each = [
        [b - w for b, w in zip(better.outcomes[s].points, worse.outcomes[s].points, strict=True)]
        for s in sorted(seeds)
    ]
    return [Mean.of(list(values)) for values in zip(*each, strict=True)][1:]


def _read(run: Run) -> Outcome:
    try:
        metrics = read_metrics(run.folder)
    except OSError as error:
        raise ConfigError(
            f"{run.folder} can't be read ({error.strerror}); remove it, and the same command "
            "trains it again"
        ) from None
    points = run.case.points
    students, masks = (
        {line.samples: line.metrics for line in metrics.evaluations if line.evaluation == name}
        for name in ("student", "mask")
    )
    missing = [samples for samples in points if samples not in students]
    if missing:
        raise ConfigError(
            f"{run.folder} holds no evaluation after {missing[0]} samples; remove it, and the same "
            "command trains it again"
        )
    metric = next((name for name in METRICS if name in students[points[-1]]), None)
    if metric is None:
        raise ConfigError(
            f"{run.folder} was evaluated without {' and '.join(METRICS)}; put captions, or class "
            "names, beside the validation set"
        )
    kept = [masks.get(samples, {}).get(OBJECTS) for samples in points]
    return Outcome(
        metric,
        [students[samples][metric] for samples in points],
        points,
        [share for share in kept if share is not None],
        _seconds(run, metrics.steps),
    )


def _seconds(run: Run, steps: list[StepLine]) -> float:
    """The seconds of a run's steps, without evaluations: each stage's samples by its median rate,
    since a first step is slow."""
    seconds, begun = 0.0, 0
    for stage in stages_of(run.case.recipe):
        num_steps = stage.num_steps(run.settings["data"]["samples"])
        end = begun + num_steps * stage.train.global_batch_size
        rates = [line.images_per_second for line in steps if begun < line.samples <= end]
        seconds += (end - begun) / statistics.median(rates)
        begun = end
    return seconds
