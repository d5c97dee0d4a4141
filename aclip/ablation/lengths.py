"""How long each row trains, so that all rows see, compute or take the same."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from aclip.ablation.cases import QUARTERS, Case
from aclip.config.recipe import Recipe
from aclip.config.recipe_file import stages_of
from aclip.errors import ConfigError
from aclip.planning.run_flops import RunFlops, RunMeter

Budget = Literal["samples", "flops", "time"]
TRIES = 8
"""Lengths that are tried for one row; where the cost is proportional to the length, the second one
fits."""
Course = Callable[[Case], np.ndarray]
"""What a run of a case has cost after each of its steps, (num_steps,) float64 and rising."""


class Lengths:
    """Lengths of the rows' runs, and the points at which these are evaluated.

    Args:
        budget: what is equal in all rows; None to leave each row as long as its recipe says.
        num_samples: samples of an epoch.
        caption_tokens: mean length of a whole caption in tokens, start and end included.
        seconds: what a sample of a row takes, by the case's name; for a budget of time.
    """

    def __init__(
        self,
        budget: Budget | None,
        num_samples: int,
        caption_tokens: float,
        seconds: dict[str, float] | None = None,
    ):
        self._budget, self._num_samples = budget, num_samples
        self._caption_tokens, self._seconds = caption_tokens, seconds or {}
        self._meters: dict[str, RunMeter] = {}

    def equal(self, cases: list[Case], of: Case) -> list[Case]:
        """The cases at the lengths at which a run of each costs what one of `of` does."""
        if self._budget is None:
            return cases
        target = float(self.cost(of)[-1])
        return [stretched_to(case, target, self.cost, self._num_samples) for case in cases]

    def shortened(self, case: Case, share: float) -> Case:
        """The case at a share of its length."""
        if share == 1:
            return case
        target = share * float(self.cost(case)[-1])
        return stretched_to(case, target, self.cost, self._num_samples)

    def at_quarters(self, case: Case) -> Case:
        """The case with evaluations at the quarters of what its runs cost, or, where no budget is
        equal, of their samples."""
        run = self._run(case)
        return at_quarters(case, run.samples, run.flops, self.cost(case))

    def num_steps(self, case: Case) -> int:
        return len(self._run(case).samples)

    def cost(self, case: Case) -> np.ndarray:
        """What the budget counts, after each step; see Course."""
        run = self._run(case)
        if self._budget == "flops":
            return run.flops
        rate = self._seconds[case.name] if self._budget == "time" else 1.0
        return rate * run.samples

    def _run(self, case: Case) -> RunFlops:
        meter = self._meters.get(case.name)
        if meter is None:
            meter = self._meters[case.name] = RunMeter(case.recipe, self._caption_tokens)
        return meter.run(case.recipe, self._num_samples)


def stretched_to(case: Case, target: float, cost: Course, num_samples: int) -> Case:
    """The case with stages that are longer or shorter by one factor, at which a run costs `target`,
    to within one of its steps.

    Args:
        target: as in `cost`.
        num_samples: samples of an epoch.

    Raises:
        ConfigError: no such length was found; says how near the tries came.
    """
    own = np.array([stage.num_steps(num_samples) for stage in stages_of(case.recipe)])
    tried: dict[tuple[int, ...], float] = {}
    factor, steps = 1.0, own.copy()
    for _ in range(TRIES):
        stretched = with_steps(case, steps, own)
        course = cost(stretched)
        missing = target - float(course[-1])
        tried[tuple(steps)] = missing
        of_steps = np.diff(course, prepend=0.0)
        if abs(missing) <= of_steps.max():
            # Nearer by whole steps of the longest stage, whose average step tells how many.
            longest = int(steps.argmax())
            begin = int(steps[:longest].sum())
            each = float(of_steps[begin : begin + int(steps[longest])].mean())
            steps[longest] = max(1, steps[longest] + round(missing / each))
        else:
            factor *= target / float(course[-1])
            steps = np.maximum(1, np.round(factor * own)).astype(int)
            if tuple(steps) in tried:  # the rounding of several stages is more than a step
                steps[int(steps.argmax())] += round(missing / float(of_steps.mean())) or 1
        if tuple(steps) in tried:
            break
    best = min(tried, key=lambda each: abs(tried[each]))
    chosen = with_steps(case, best, own)
    if abs(tried[best]) > np.diff(cost(chosen), prepend=0.0).max():
        raise ConfigError(
            f"row {case.row.name} has no length at which it costs what the others do (at best "
            f"{abs(tried[best]) / target:.1%} are missing); raise train.epochs, or leave it out"
        )
    return chosen


def with_steps(case: Case, steps: Sequence[int], own: Sequence[int]) -> Case:
    """The case with so many steps in each stage, and the warm-up of the learning rate as much
    longer or shorter.

    Args:
        own: the numbers of steps that the case has.
    """
    changes = []
    for number, stage in enumerate(stages_of(case.recipe)):
        if steps[number] == own[number]:
            continue
        prefix = "train" if number == 0 else f"stages.{number - 1}.train"
        warmup = stage.train.warmup_epochs * steps[number] / own[number]
        changes += [
            f"{prefix}.samples={steps[number] * stage.train.global_batch_size}",
            f"{prefix}.warmup_epochs={warmup:.6g}",
        ]
    return case.changed(changes) if changes else case


def at_quarters(case: Case, samples: np.ndarray, flops: np.ndarray, cost: np.ndarray) -> Case:
    """The case with evaluations after the steps with which the quarters of its cost are full.

    Args:
        samples, flops, cost: (num_steps,), what a run has seen, computed and cost after each step.
    """
    quarters = np.arange(1, QUARTERS + 1) / QUARTERS
    steps = np.searchsorted(cost, quarters * cost[-1])
    points = [int(each) for each in samples[steps]]
    changes = [f"train.evaluate_at={points}", "train.evaluate_every=0"]
    changes += [f"train.checkpoint_every={points[0]}", "train.keep_checkpoints=1"]
    placed = case.changed(changes)
    return replace(placed, flops=(0.0, *(float(each) for each in flops[steps])))


def in_epochs(case: Case, num_samples: int) -> Recipe:
    """The case's recipe with lengths in epochs, for measurements that are told of no data set."""
    changes = []
    for number, stage in enumerate(stages_of(case.recipe)):
        prefix = "train" if number == 0 else f"stages.{number - 1}.train"
        samples = stage.num_steps(num_samples) * stage.train.global_batch_size
        changes += [f"{prefix}.samples=null", f"{prefix}.epochs={samples / num_samples!r}"]
    return case.changed(changes).recipe
