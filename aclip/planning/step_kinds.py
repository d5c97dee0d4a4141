"""The kinds of step that a run has, with the teacher's pass over its view and without it, and how
often each comes: what a step of the run costs is their average."""

from dataclasses import dataclass

from aclip.config.recipe import Recipe
from aclip.data.batch import Batch
from aclip.data.synthetic import without_teacher_view

EPOCH_SAMPLES = 15_000_000
"""YFCC-15M's, for measurements that are told of no data set. In an epoch of so many steps the
shares follow from the recipe's epochs alone."""


@dataclass(frozen=True)
class StepKind:
    """One kind of step.

    Attributes:
        name: what tables call it.
        share: of the run's steps.
        batch: what such a step reads.
        progress: of the run, at which it is such a step.
    """

    name: str
    share: float
    batch: Batch
    progress: float


def step_kinds(recipe: Recipe, batch: Batch, num_samples: float = EPOCH_SAMPLES) -> list[StepKind]:
    """The kinds of a run's steps, at least one; the one with the teacher's pass is the first.

    Args:
        batch: a batch with all that a step of the recipe may read, see synthetic_batch.
        num_samples: samples of an epoch.
    """
    share = teaching_share(recipe, num_samples)
    kinds = [StepKind("teaching step", share, batch, 1.0)]
    if share < 1:
        other = without_teacher_view(recipe, batch)
        # Scores are read after the warm-up; a step without them is one of the warm-up.
        progress = 0.0 if other.stored_scores is None else 1.0
        kinds.append(StepKind("other step", 1 - share, other, progress))
    return kinds


def teaching_share(recipe: Recipe, num_samples: float = EPOCH_SAMPLES) -> float:
    """The share of a run's steps in which the teacher runs on its view; 1 without such a view,
    since all steps are alike then."""
    return recipe.teaching(round(num_samples)).average_share if recipe.needs_teacher_view else 1.0
