"""metrics.jsonl: one JSON object a line, for each log step and each model's evaluation."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from aclip.run_folder.layout import METRICS_FILE


@dataclass(frozen=True)
class StepLine:
    """A log step; a number that is None is not known, or is not finite.

    The names are the keys of metrics.jsonl, in its order.

    Attributes:
        samples: samples that the run has seen.
        step: optimizer steps that it has done.
        terms: loss terms by name, `loss` among them.
        memory_gib: the most that rank 0 has held on its device.
        learning_rate: the step's learning rate.
        momentum: the momentum of the teacher's average in this step.
        logit_scale: the factor after this step.
        gradient_norm: the norm of the gradient before clipping.
        skipped: samples that could not be used so far, by kind.
        repeated: samples so far that came once more in their epoch, in place of skipped ones.
        noted: samples so far whose captions' text was guessed or left out in part, and those of
            each key of data.captions, by kind; the file holds it where there are any.
        images_per_second: images of all ranks, mean over the last steps.
        data_wait_percent: the part of the host's time that waits for data, over the last steps.
        taught: the share of the samples since the last line that the teacher has scored; None, and
            not in the file, where it scores each sample or none.
        keep_ratio: the share of the blocks that views keep in this step; None, and not in the file,
            where it is constant.
    """

    samples: int
    step: int
    terms: dict[str, float | None]
    memory_gib: float | None = None
    learning_rate: float | None = None
    momentum: float | None = None
    logit_scale: float | None = None
    gradient_norm: float | None = None
    skipped: dict[str, int] = field(default_factory=dict)
    repeated: int = 0
    noted: dict[str, int] = field(default_factory=dict)
    images_per_second: float | None = None
    data_wait_percent: float | None = None
    taught: float | None = None
    keep_ratio: float | None = None


@dataclass(frozen=True)
class EvaluationLine:
    """One model's evaluation.

    Attributes:
        samples: samples that the run has seen.
        evaluation: what was evaluated, such as student.
        metrics: shares in [0, 1], counts with names that start with num_, and losses with names
            that start with loss_.
        warning: what is wrong with it, a sentence; the file holds it where there is one.
    """

    samples: int
    evaluation: str
    metrics: dict[str, float | None]
    warning: str = ""


@dataclass(frozen=True)
class Metrics:
    """The lines of a metrics.jsonl, in its order."""

    steps: list[StepLine]
    evaluations: list[EvaluationLine]


def read_metrics(path: Path) -> Metrics:
    """What a metrics.jsonl holds, without a line that a killed process left unfinished.

    Args:
        path: a run folder, or the file itself.

    Raises:
        OSError: the file can't be read.
    """
    file = path / METRICS_FILE if path.is_dir() else path
    lines = [parse_line(text) for text in file.read_text(encoding="utf-8").splitlines(True)]
    lines = [line for line in lines if line is not None]
    return Metrics(
        [_of_kind(StepLine, line) for line in lines if "terms" in line],
        [_of_kind(EvaluationLine, line) for line in lines if "evaluation" in line],
    )


def parse_line(text: str) -> dict | None:
    """A line of metrics.jsonl, or None for one that a killed process left unfinished."""
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if text.endswith("\n") and isinstance(line, dict) and "samples" in line else None


def flatten(values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Values by name, `skipped/no_image` for one of a dict; what is None is left out."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from ((f"{name}/{key}", number) for key, number in flatten(value))
        elif value is not None:
            yield name, value


def _of_kind(kind: type, line: dict) -> Any:
    """A line's values; an older run may lack some, and a newer one hold more."""
    return kind(**{each.name: line[each.name] for each in fields(kind) if each.name in line})
