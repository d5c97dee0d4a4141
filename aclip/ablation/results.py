"""What finished runs reached: means over seeds with their standard errors."""

import json
import math
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path

from aclip.ablation.cases import Case
from aclip.ablation.runs import Run
from aclip.config.recipe_file import stages_of
from aclip.errors import ConfigError
from aclip.run_folder.metrics_file import Metrics, StepLine, read_metrics

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
        objects: the share of the objects' patches that the mask kept, at each of the points at
            which a mask was evaluated; empty where none was.
        seconds: what the steps took, by each stage's median of the log steps; None in kept results
            that do not tell.
    """

    metric: str
    points: list[float]
    objects: list[float]
    seconds: float | None


@dataclass(frozen=True)
class Result:
    """A row at one keep ratio and the outcomes of its finished runs: all that a page tells of it.

    Attributes:
        row, label, published, against: see Row.
        keep_ratio, overrides: see Case.
        samples: after which its runs are evaluated, at 0, 25, 50, 75 and 100 % of a run.
        flops: of a run up to there.
        num_seeds: how many runs there are to be.
        outcomes: of the finished ones, by seed.
        rates: what the runs of a sweep reached, by their learning rates, NaN where the loss was not
            finite; empty without a sweep.
        rate: the learning rate that was chosen; None without a sweep, and until it is complete.
    """

    row: str
    label: str
    keep_ratio: float | None
    published: float | None
    against: str
    overrides: list[str]
    samples: list[int]
    flops: list[float]
    num_seeds: int
    outcomes: dict[int, Outcome]
    rates: dict[float, float] = field(default_factory=dict)
    rate: float | None = None

    def accuracy(self) -> list[Mean]:
        """The means at 25, 50, 75 and 100 % of the run; empty without an outcome."""
        each = [outcome.points[1:] for outcome in self.outcomes.values()]
        return [Mean.of(list(values)) for values in zip(*each, strict=True)]

    def objects(self) -> list[Mean]:
        """Share of the objects' patches that the mask keeps, untrained and at the end; or []."""
        each = [[o.objects[0], o.objects[-1]] for o in self.outcomes.values() if o.objects]
        return [Mean.of(list(values)) for values in zip(*each, strict=True)]

    def seconds(self) -> float | None:
        """What a run's steps take, the median of the seeds; None where no outcome tells."""
        known = [o.seconds for o in self.outcomes.values() if o.seconds is not None]
        return statistics.median(known) if known else None


def read_results(runs: list[Run]) -> list[Result]:
    """What the runs have reached so far, by their cases, in the order of these.

    Args:
        runs: all of the ablation, finished or not.

    Raises:
        ConfigError: a finished run's metrics are not there, or not whole.
    """
    by_case: dict[str, list[Run]] = {}
    for run in runs:
        by_case.setdefault(run.case.name, []).append(run)
    return [_result_of(of_case[0].case, of_case) for of_case in by_case.values()]


@dataclass(frozen=True)
class Page:
    """What a page shows: a title, a sentence about all rows or none, and the results."""

    title: str
    note: str
    results: list[Result]

    def to_json(self) -> bytes:
        """What page_of_json reads back."""
        rows = [asdict(result) for result in self.results]
        for row in rows:
            row["rates"] = {rate: _number(value) for rate, value in row["rates"].items()}
        content = {"title": self.title, "note": self.note, "rows": rows}
        return json.dumps(content, indent=1).encode()


def page_of_json(path: Path) -> Page:
    """What an ablation.json holds.

    Raises:
        ConfigError: the file can't be read, or is none of an ablation.
    """
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        return Page(kept["title"], kept["note"], [_result_of_json(row) for row in kept["rows"]])
    except OSError as error:
        reason = error.strerror
    except (ValueError, TypeError, KeyError):
        reason = "it is not what launch/ablate.py writes"
    raise ConfigError(
        f"--report_only is {path}, which can't be read ({reason}); give an ablation.json"
    )


def reached(run: Run) -> float:
    """A finished run's accuracy at its end.

    Raises:
        ConfigError: as in read_results.
    """
    _, (accuracy,) = _accuracies(run, _metrics(run), _ends(run)[-1:])
    return accuracy


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


def _result_of(case: Case, runs: list[Run]) -> Result:
    return Result(
        row=case.row.name,
        label=case.label,
        keep_ratio=case.keep_ratio,
        published=case.row.published,
        against=case.row.against,
        overrides=list(case.overrides),
        samples=case.points,
        flops=list(case.flops),
        num_seeds=len(runs),
        outcomes={run.seed: _outcome(run) for run in runs if run.is_finished},
    )


def _outcome(run: Run) -> Outcome:
    metrics, points = _metrics(run), run.case.points
    metric, accuracies = _accuracies(run, metrics, points)
    masks = {e.samples: e.metrics for e in metrics.evaluations if e.evaluation == "mask"}
    kept = [masks.get(samples, {}).get(OBJECTS) for samples in points]
    objects = [share for share in kept if share is not None]
    return Outcome(metric, accuracies, objects, _seconds(run, metrics.steps))


def _metrics(run: Run) -> Metrics:
    try:
        return read_metrics(run.folder)
    except OSError as error:
        raise ConfigError(
            f"{run.folder} can't be read ({error.strerror}); remove it, and the same command "
            "trains it again"
        ) from None


def _accuracies(run: Run, metrics: Metrics, points: list[int]) -> tuple[str, list[float]]:
    """The metric that is compared, and the student's values after so many samples."""
    students = {e.samples: e.metrics for e in metrics.evaluations if e.evaluation == "student"}
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
    return metric, [students[samples][metric] for samples in points]


def _ends(run: Run) -> list[int]:
    """The samples after which each of a run's stages ends."""
    ends = [0]
    for stage in stages_of(run.case.recipe):
        num_steps = stage.num_steps(run.settings["data"]["samples"])
        ends.append(ends[-1] + num_steps * stage.train.global_batch_size)
    return ends[1:]


def _seconds(run: Run, steps: list[StepLine]) -> float:
    """The seconds of a run's steps, without evaluations: each stage's samples by its median rate,
    since a first step is slow."""
    seconds, begun = 0.0, 0
    for end in _ends(run):
        rates = [line.images_per_second for line in steps if begun < line.samples <= end]
        seconds += (end - begun) / statistics.median(rates)
        begun = end
    return seconds


def _number(value: float) -> float | None:
    """JSON knows no NaN."""
    return None if math.isnan(value) else value


def _result_of_json(row: dict) -> Result:
    outcomes = {int(seed): Outcome(**of_seed) for seed, of_seed in row["outcomes"].items()}
    rates = {
        float(rate): math.nan if value is None else value for rate, value in row["rates"].items()
    }
    return Result(**row | {"outcomes": outcomes, "rates": rates})
