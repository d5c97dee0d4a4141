"""The FLOPs of a run from its first step to its last, over all its stages, and of its average
sample."""

from dataclasses import dataclass

import numpy as np

from aclip.config.geometry import kept_blocks, patch_grid
from aclip.config.recipe import Recipe
from aclip.config.recipe_file import stages_of
from aclip.data.synthetic import MEAN_LENGTH, batch_of_mean_captions, mean_in_training
from aclip.planning.measure_step import measure_run, measure_step
from aclip.planning.step_kinds import step_kinds


@dataclass(frozen=True)
class RunFlops:
    """What a run has seen and computed after each of its steps.

    Attributes:
        samples: (num_steps,) int64, of all stages so far.
        flops: (num_steps,) float64, of the matrix products that are needed once, forward and
            backward, the teacher's among them.
    """

    samples: np.ndarray
    flops: np.ndarray

    @property
    def total(self) -> float:
        return float(self.flops[-1])

    def after(self, samples: int) -> float:
        """The FLOPs of the steps that end within the first so many samples."""
        steps = int(np.searchsorted(self.samples, samples, side="right"))
        return float(self.flops[steps - 1]) if steps else 0.0


class RunMeter:
    """Counts the FLOPs of one recipe's runs of any length; each kind of step is measured once.

    Args:
        recipe: with its stages.
        caption_tokens: mean length of a whole caption in tokens, start and end included.
    """

    def __init__(self, recipe: Recipe, caption_tokens: float):
        self._batches = []
        for stage in stages_of(recipe):
            length = mean_in_training(stage, caption_tokens)
            self._batches.append(batch_of_mean_captions(stage, length, stage.caption_tokens))
        self._measured: dict[tuple[int, int, bool], float] = {}

    def run(self, recipe: Recipe, num_samples: int) -> RunFlops:
        """The FLOPs of a run.

        Args:
            recipe: the meter's recipe, in which the lengths of the stages may be others.
            num_samples: samples of an epoch.
        """
        stages = stages_of(recipe)
        per_step = []
        for number, stage in enumerate(stages):
            per_sample = self._flops_per_sample(number, stage, num_samples)
            per_step.append(stage.train.global_batch_size * per_sample)
        sizes = [stage.train.global_batch_size for stage in stages]
        seen = np.repeat(np.array(sizes), [len(each) for each in per_step])
        return RunFlops(np.cumsum(seen), np.cumsum(np.concatenate(per_step)))

    def _flops_per_sample(self, number: int, stage: Recipe, num_samples: int) -> np.ndarray:
        """(num_steps,) float64: what a sample costs in each step of a stage."""
        nodes: dict[bool, dict[int, float]] = {False: {}, True: {}}
        for kind in step_kinds(stage, self._batches[number], num_samples):
            is_taught = kind.batch.teacher_view is not None
            key = (number, kind.num_kept_blocks, is_taught)
            if key not in self._measured:
                step = measure_step(stage, kind.batch, modes=("none",), progress=kind.progress)
                self._measured[key] = step.total_flops
            nodes[is_taught][kind.num_kept_blocks] = self._measured[key]
        num_steps = stage.num_steps(num_samples)
        taught = np.zeros(num_steps, bool)
        if stage.needs_teacher_view:
            scores_all = stage.teaching(num_samples).scores_all
            taught[:] = [scores_all(step) for step in range(1, num_steps + 1)]
        grid = patch_grid(stage)
        if stage.mask.keep_ratio_end is None:
            kept = np.full(num_steps, kept_blocks(stage.mask, grid, 1.0))
        else:
            progress = np.arange(num_steps) / num_steps
            kept = np.array([kept_blocks(stage.mask, grid, each) for each in progress])
        flops = np.empty(num_steps)
        for is_taught, of_kind in nodes.items():
            chosen = taught == is_taught
            if chosen.any():
                flops[chosen] = _between(of_kind, kept[chosen].astype(float))
        return flops


def sample_flops(recipe: Recipe, num_samples: float) -> float:
    """The FLOPs of a sample's matrix products in training, each needed once: the average over a
    run with the recipe, without stages, for captions of YFCC-15M's mean length. It takes less than
    a second, whatever the towers' size.

    Args:
        num_samples: samples of an epoch.
    """
    length = mean_in_training(recipe, MEAN_LENGTH)
    batch = batch_of_mean_captions(recipe, length, recipe.caption_tokens)
    return measure_run(recipe, batch, num_samples, modes=("none",)).total_flops


def _between(nodes: dict[int, float], kept: np.ndarray) -> np.ndarray:
    """The FLOPs at so many blocks: the polynomial through the nodes (Lagrange's form), which are at
    most three, since a step has parts that go with the number of blocks and with its square."""
    values = np.zeros_like(kept)
    for node, flops in nodes.items():
        basis = np.ones_like(kept)
        for other in nodes:
            if other != node:
                basis *= (kept - other) / (node - other)
        values += flops * basis
    return values
