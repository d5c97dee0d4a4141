"""A run as a function of its steps: how many, what each is taken with, what is due after it."""

from aclip.config.recipe import Recipe
from aclip.method.masks.keep_ratio import keep_ratio
from aclip.method.schedules import ema_momentum, learning_rate


class RunSchedule:
    """What is planned for each step of a run; steps count from 1.

    Args:
        recipe: the run's recipe.
        num_samples: samples of an epoch.

    Attributes:
        num_steps, total_samples: the length of the whole run.
        teaching: what the teacher does in each step.
    """

    def __init__(self, recipe: Recipe, num_samples: int):
        train = recipe.train
        self.teaching = recipe.teaching(num_samples)
        self.num_steps = self.teaching.num_steps
        self.total_samples = self.num_steps * train.global_batch_size
        self._warmup_samples = round(train.warmup_epochs * num_samples)
        self._recipe = recipe

    def learning_rate(self, step: int) -> float:
        config = self._recipe.optimizer
        return learning_rate(
            self._samples(step - 1),
            total=self.total_samples,
            warmup=self._warmup_samples,
            start=config.warmup_start_lr,
            peak=config.lr,
            final=config.final_lr,
            schedule=config.schedule,
            cooldown=config.cooldown,
            cooldown_shape=config.cooldown_shape,
        )

    def momentum(self, step: int) -> float | None:
        """The momentum of the average of the weights; None where the run keeps none."""
        start = self._recipe.average_momentum
        if start is None:
            return None
        return ema_momentum(self._samples(step - 1), total=self.total_samples, start=start)

    def progress(self, step: int) -> float:
        """How much of the run lies before the step, in [0, 1)."""
        return self._samples(step - 1) / self.total_samples

    def logged(self, step: int) -> dict[str, float | None]:
        """What a progress line tells of the schedule."""
        return {
            "learning_rate": self.learning_rate(step),
            "momentum": self.momentum(step),
            "keep_ratio": self.keep_ratio(step),
        }

    def keep_ratio(self, step: int) -> float | None:
        """The share of the blocks that views keep; None where it is constant."""
        mask = self._recipe.mask
        if mask.keep_ratio_end is None:
            return None
        return keep_ratio(
            self.progress(step), mask.keep_ratio, mask.keep_ratio_end, mask.keep_ratio_shape
        )

    def is_due(self, every: int, step: int) -> bool:
        """Whether a multiple of `every` samples lies in the step; with 0 none does."""
        return every > 0 and self._samples(step) // every > self._samples(step - 1) // every

    def is_evaluated(self, step: int, begun: int) -> bool:
        """Whether an evaluation is due after the step.

        Args:
            begun: samples that the run has seen when its stage begins.
        """
        train = self._recipe.train
        first, last = begun + self._samples(step - 1) + 1, begun + self._samples(step)
        is_at = any(first <= samples <= last for samples in train.evaluate_at)
        return is_at or self.is_due(train.evaluate_every, step)

    def is_logged(self, step: int) -> bool:
        """Whether a progress line is due: after the first step, and every `train.log_every` steps
        or, in a short run, every tenth of the run."""
        every = min(self._recipe.train.log_every, max(1, self.num_steps // 10))
        return step == 1 or step % every == 0

    def _samples(self, step: int) -> int:
        """Samples that the run has seen after so many steps."""
        return step * self._recipe.train.global_batch_size
