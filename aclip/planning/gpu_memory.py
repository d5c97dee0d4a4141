"""What a GPU holds under a ZeRO stage, and the largest micro-batch that fits."""

from collections.abc import Callable
from dataclasses import dataclass

from aclip.config.sections import Recompute
from aclip.planning.zero_memory import States


@dataclass(frozen=True)
class Memory:
    """What a GPU holds under a ZeRO stage, in bytes; activations come on top.

    Attributes:
        states: the parameters' states. teacher: the teacher's average and compute copy.
        heads, losses: what these keep for all the images that the GPU has in a step.
        batches: the pixels of this step's images and of those ahead.
        local_batch_size: how many images that are.
    """

    states: States
    teacher: float
    heads: float
    losses: float
    batches: float
    local_batch_size: int

    def peak(self, micro_batch_size: int, kept: float) -> float:
        """The most bytes at a time, when each sample of the micro-batch keeps `kept` bytes."""
        activations = micro_batch_size * kept + self.heads + self.losses
        num_micro_steps = self.local_batch_size // micro_batch_size
        return self.teacher + self.batches + self.states.peak(activations, num_micro_steps)

    def largest_fitting(self, kept: float, limit: float) -> int:
        """The largest micro-batch that stays within `limit` bytes; 0 for none."""
        return largest_divisor(self.local_batch_size, lambda micro: self.peak(micro, kept) <= limit)


@dataclass(frozen=True)
class MemoryRow:
    """A ZeRO stage's memory on one GPU.

    Attributes:
        title: the stage, and its precision where that is not the ds_config's.
        memory: what the GPU holds without activations.
        kept: bytes that a sample's activations take, by what all towers recompute; None stands for
            what the recipe says.
        largest: the largest micro-batch that fits, by the same; 0 for none.
    """

    title: str
    memory: Memory
    kept: dict[Recompute | None, float]
    largest: dict[Recompute | None, int]

    def peak(self, micro_batch_size: int, recompute: Recompute | None) -> float:
        return self.memory.peak(micro_batch_size, self.kept[recompute])


def largest_divisor(number: int, fits: Callable[[int], bool]) -> int:
    """The largest divisor of `number` that fits; 0 if there is none."""
    divisors = (n for n in range(number, 0, -1) if number % n == 0)
    return next((n for n in divisors if fits(n)), 0)
