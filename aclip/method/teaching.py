"""What the teacher does in each step of a run: nothing yet, score every sample, or leave that to
the scores that it gave in an earlier epoch. A pure function of the run's numbers.
"""

from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Teaching:
    """A run's steps as the teacher sees them; steps count from 1, epochs from 0.

    In a blind warm-up nothing reads the teacher's view, and it does not run on it. With `reuse` k
    its scores are kept from the first epoch on that begins after the warm-up: in that epoch and in
    each k-th behind it the teacher scores every sample, and between these its scores are read. On
    the way from the warm-up to that epoch it scores every sample, and nothing is kept.

    Args:
        num_samples: samples of an epoch.
        batch_size: samples of a step, on all ranks.
        num_steps: steps of the whole run.
        reuse: epochs that share a sample's scores, teacher.reuse.
        warmup: the share of the run that is warm-up, mask.warmup.
        is_blind: whether nothing reads the teacher's view in the warm-up.
    """

    num_samples: int
    batch_size: int
    num_steps: int
    reuse: int = 1
    warmup: float = 0.0
    is_blind: bool = False

    @cached_property
    def warmup_steps(self) -> int:
        """Steps before which less than the share `warmup` of the run lies."""
        return bisect_left(range(self.num_steps), self.warmup, key=lambda s: s / self.num_steps)

    @cached_property
    def first_epoch(self) -> int:
        """The first epoch whose scores are kept: it begins at the end of the warm-up or later."""
        return -(-self.warmup_steps * self.batch_size // self.num_samples)

    def epoch(self, step: int) -> int:
        """The epoch in which a step lies; an epoch ends between two steps, see order.even_parts."""
        return (step * self.batch_size - 1) // self.num_samples

    def first_step(self, epoch: int) -> int:
        """The first step of an epoch."""
        return epoch * self.num_samples // self.batch_size + 1

    def generation(self, epoch: int) -> int | None:
        """The epoch whose scores hold in `epoch`; None where none are kept."""
        if self.reuse == 1 or epoch < self.first_epoch:
            return None
        return epoch - (epoch - self.first_epoch) % self.reuse

    def reads_scores(self, step: int) -> bool:
        """Whether kept scores are read in a step, and only what lacks them is scored."""
        epoch = self.epoch(step)
        return self.generation(epoch) not in (None, epoch)

    def scores_all(self, step: int) -> bool:
        """Whether the teacher scores every sample of a step."""
        is_blind = self.is_blind and step <= self.warmup_steps
        return not is_blind and not self.reads_scores(step)

    def left_over(self, epoch: int) -> int:
        """The most samples that come without scores in an epoch that reads them, if all is well:
        what the epochs since the scores were made have all left over, which may come twice."""
        made = range(self.generation(epoch), epoch)
        return 2 * min((each + 1) * self.num_samples % self.batch_size for each in made)

    @cached_property
    def average_share(self) -> float:
        """The share of the run's steps in which the teacher scores every sample."""
        return sum(map(self.scores_all, range(1, self.num_steps + 1))) / self.num_steps
