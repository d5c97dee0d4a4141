"""What is evaluated under one name."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from aclip.evaluation.sets.evaluation_set import EvaluationSet
from aclip.evaluation.sets.prompts import ClassPrompts

RETRIEVAL = "retrieval"
"""The metric of a set of images and captions without classes."""


@dataclass(frozen=True)
class Task:
    """One row of the results.

    Attributes:
        name, title: what the command line and what tables call it.
        metric: top1, mean_per_class, mean_top1_top5, roc_auc or RETRIEVAL.
        dataset: what is evaluated.
        source: where it is, in words.
        prompts: the prompts of its classes; None for retrieval alone.
        train: opens the split that a linear probe learns from; None where there is none.
    """

    name: str
    title: str
    metric: str
    dataset: EvaluationSet
    source: str
    prompts: ClassPrompts | None
    train: Callable[[], EvaluationSet] | None = None


def retrieval_task(name: str, title: str, dataset: EvaluationSet, folder: Path) -> Task:
    """A set in `folder` for retrieval alone."""
    return Task(name, title, RETRIEVAL, dataset, source=str(folder), prompts=None)
