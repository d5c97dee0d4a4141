"""Says once, after a run's first steps, whether its data come as fast as its steps take them."""

import torch

from aclip.data.loader import TrainLoader
from aclip.distributed import say, world_size
from aclip.training.metrics.step_timer import StepTimer

FIRST_STEPS = 50
"""Steps that are looked at, behind the very first one, which starts workers and compiles."""
MUCH_WAITING = 20
"""Percent of the time, above which a key is named."""


class LoadingNotice:
    """One line about loading in a run.

    Args:
        loader: the run's loader. Rank 0 measures its own workers, and takes the other ranks' to be
            as fast.
        timer: the run's timer, with a window of FIRST_STEPS.
        device: this rank's device, on which views could be cut.
    """

    def __init__(self, loader: TrainLoader, timer: StepTimer, device: torch.device):
        self._loader = loader
        self._timer = timer
        self._on_gpu = device.type == "cuda"
        self._steps = 0

    def after_step(self) -> None:
        """Prints the line after step FIRST_STEPS + 1 of this start, on rank 0. On a CPU without
        workers, as in the demo, loading is a part of the step, and there is nothing to say."""
        self._steps += 1
        if self._steps == FIRST_STEPS + 1 and (line := self._line()):
            say(line)

    def _line(self) -> str:
        loader, wait = self._loader, self._timer.data_wait_percent
        rate, taken = loader.images_per_second, self._timer.images_per_second
        is_of_step = loader.num_workers == 0 and not self._on_gpu
        if is_of_step or rate is None or not taken or wait >= 100:
            return ""
        makers = f"{loader.num_workers} workers a rank" if loader.num_workers else "no workers"
        line = (
            f"loading: {makers} can make {rate * world_size():,.0f} images/s in all, the steps "
            f"alone can take {taken / (1 - wait / 100):,.0f} images/s"
        )
        if wait <= MUCH_WAITING:
            return line
        return f"{line}; they waited for data for {wait:.0f} % of the time: {self._advice()}"

    def _advice(self) -> str:
        loader = self._loader
        if loader.advised_workers > loader.num_workers:
            return f"set data.workers={loader.advised_workers} (now {loader.num_workers})"
        if self._on_gpu and loader.crops == "worker":
            return "set data.crops=device, with --allow_changes where the run goes on"
        return (
            "give each rank more cores, or store smaller images (launch/convert.py --short-side), "
            "which decode faster"
        )
