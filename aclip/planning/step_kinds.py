"""The kinds of step that a run has, with the teacher's pass over its view and without it, and by
how many blocks the views keep, and how often each comes: what a step of the run costs is their
average."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from aclip.config.geometry import kept_blocks, patch_grid
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
        share: how many of the run's steps are such steps, in [0, 1].
        batch: what such a step reads.
        progress: how much of the run is done at such a step, in [0, 1].
        num_kept_blocks: how many blocks of a view are kept; the student does the same in all kinds
            of the same number.
    """

    name: str
    share: float
    batch: Batch
    progress: float
    num_kept_blocks: int


def step_kinds(recipe: Recipe, batch: Batch, num_samples: float = EPOCH_SAMPLES) -> list[StepKind]:
    """The kinds of a run's steps, at least one; the first one takes the most memory: no other keeps
    more blocks, and it has the teacher's pass if one of these has.

    Where keep_ratio changes, these are steps with the fewest blocks, the most and some in between,
    with shares by which the average is exact for whatever goes with the number of tokens and with
    its square, as matrix products and attention do.

    Args:
        batch: a batch with all that a step of the recipe may read, see synthetic_batch.
        num_samples: samples of an epoch.
    """
    if recipe.mask.keep_ratio_end is not None:
        return list(_kinds_by_blocks(recipe, batch, num_samples))
    share = teaching_share(recipe, num_samples)
    kept = kept_blocks(recipe.mask, patch_grid(recipe), 1.0)
    kinds = [StepKind("teaching step", share, batch, 1.0, kept)]
    if share < 1:
        other = without_teacher_view(recipe, batch)
        # Scores are read after the warm-up; a step without them is one of the warm-up.
        progress = 0.0 if other.stored_scores is None else 1.0
        kinds.append(StepKind("other step", 1 - share, other, progress, kept))
    return kinds


def teaching_share(recipe: Recipe, num_samples: float = EPOCH_SAMPLES) -> float:
    """The share of a run's steps in which the teacher runs on its view; 1 without such a view,
    since all steps are alike then."""
    return recipe.teaching(round(num_samples)).average_share if recipe.needs_teacher_view else 1.0


def describe_keep_ratio(recipe: Recipe) -> str:
    """What a view keeps at the start and at the end of a run; empty where that is the same."""
    mask = recipe.mask
    if mask.keep_ratio_end is None:
        return ""
    return (
        f"a view keeps {mask.keep_ratio:.0%} of its blocks at first and {mask.keep_ratio_end:.0%} "
        "at the end"
    )


def _kinds_by_blocks(recipe: Recipe, batch: Batch, num_samples: float) -> Iterator[StepKind]:
    """The kinds of a run whose keep_ratio changes."""
    grid = patch_grid(recipe)
    teaching = recipe.teaching(round(num_samples))
    has_teacher_view = recipe.needs_teacher_view
    counts: dict[bool, Counter[int]] = {True: Counter(), False: Counter()}
    progress_of: dict[tuple[int, bool], float] = {}
    for step in range(1, teaching.num_steps + 1):
        progress = (step - 1) / teaching.num_steps
        kept = kept_blocks(recipe.mask, grid, progress)
        is_taught = has_teacher_view and teaching.scores_all(step)
        counts[is_taught][kept] += 1
        progress_of[kept, is_taught] = progress
    shares = {
        (kept, is_taught): number / teaching.num_steps
        for is_taught, numbers in counts.items()
        for kept, number in _fewer_nodes(numbers).items()
    }
    for kept, is_taught in sorted(shares, reverse=True):
        name = "step" if not has_teacher_view else "teaching step" if is_taught else "other step"
        without = has_teacher_view and not is_taught
        yield StepKind(
            f"{name}, {kept} of {(grid // recipe.mask.block_size) ** 2} blocks",
            shares[kept, is_taught],
            without_teacher_view(recipe, batch) if without else batch,
            progress_of[kept, is_taught],
            kept,
        )


def _fewer_nodes(counts: Counter[int]) -> dict[int, float]:
    """At most three of the numbers, with weights by which the sum of any polynomial of degree 2 is
    that of all numbers, each as often as it is counted (the weights that Lagrange's form gives)."""
    if len(counts) <= 3:
        return dict(counts)
    least, *inner, most = sorted(counts)
    mean = sum(number * often for number, often in counts.items()) / counts.total()
    # With the mean between the ends no weight is negative.
    nodes = least, min(inner, key=lambda number: abs(number - mean)), most

    def basis(node: int, number: int) -> float:
        return prod((number - other) / (node - other) for other in nodes if other != node)

    return {
        node: sum(often * basis(node, number) for number, often in counts.items()) for node in nodes
    }
