"""What every step must be watched for on all ranks: a loss that is not finite, and signals."""

import math
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from aclip.distributed import world_size

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class NonFiniteLoss(RuntimeError):
    """The loss or gradient of a step was not finite; names the step, the terms and the samples."""


class StepWatch:
    """Joins the terms and signals of a step over the ranks, and reads them one step late.

    Reading at once would make the host wait for the device; whoever writes a checkpoint settles
    first, so that none holds the weights of an unread step.
    """

    def __init__(self):
        self._received: set[int] = set()
        self._step = 0
        self._names: list[str] = []
        self._keys: list[str] = []
        self._sums: Tensor | None = None
        self._signals: set[int] = set()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Remembers SIGTERM and SIGUSR1 for the next step instead of dying of them."""

        def remember(number, frame):
            self._received.add(number)

        previous = {number: signal.signal(number, remember) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def put(self, step: int, terms: dict[str, Tensor], keys: list[str]) -> None:
        """Starts to watch a step: its scalar terms and its samples' keys on this rank."""
        received, self._received = self._received, set()
        self._step, self._names, self._keys = step, list(terms), keys
        sums = torch.stack([term.float() for term in terms.values()])
        flags = torch.zeros(len(SIGNALS), device=sums.device)
        for place, number in enumerate(SIGNALS):
            if number in received:
                flags[place] = 1  # not copied from the host, which would wait for the device
        self._sums = torch.cat([sums, flags])
        if world_size() > 1:
            dist.all_reduce(self._sums)

    def mean_terms(self) -> dict[str, float]:
        """The terms of the watched step, mean over the ranks."""
        sums = self._sums[: len(self._names)].tolist()
        return {name: total / world_size() for name, total in zip(self._names, sums, strict=True)}

    def settle(self) -> None:
        """Reads the watched step, if there is one.

        Raises:
            NonFiniteLoss: on every rank, if a term is not finite.
        """
        if self._sums is None:
            return
        terms = self.mean_terms()
        if not all(math.isfinite(value) for value in terms.values()):
            raise NonFiniteLoss(self._describe(terms))
        flags = self._sums[len(self._names) :].tolist()
        self._signals |= {number for number, flag in zip(SIGNALS, flags, strict=True) if flag}
        self._sums = None

    def take_signals(self) -> set[int]:
        """The signals of settled steps that any rank received, each given once."""
        taken, self._signals = self._signals, set()
        return taken

    def _describe(self, terms: dict[str, float]) -> str:
        everyone = [self._keys]
        if world_size() > 1:
            everyone = [None] * world_size()
            dist.all_gather_object(everyone, self._keys)
        listed = ", ".join(f"{name} {value:g}" for name, value in terms.items())
        samples = " ".join(key for keys in everyone for key in keys)
        return (
            f"the loss or the gradient of step {self._step} is not finite ({listed}); the last "
            f"checkpoint is intact; the batch's samples: {samples}"
        )
