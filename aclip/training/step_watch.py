"""What every step must be watched for on all ranks: a loss that is not finite, and signals."""

import math
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from aclip.distributed import gather_objects, world_size

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class NonFiniteLoss(RuntimeError):
    """The loss or gradient of a step was not finite; names the step, the terms and the samples."""


@dataclass(frozen=True)
class WatchedStep:
    """What all ranks together know of a step.

    Attributes:
        step: which one.
        terms: its terms, mean over the ranks.
        counts: what was counted in it, summed over the ranks.
    """

    step: int
    terms: dict[str, float]
    counts: list[int]


class StepWatch:
    """Joins terms, counts and signals of a step over the ranks, and reads them one step late.

    Reading at once would make the host wait for the device; whoever writes a checkpoint settles
    first, so that none holds the weights of an unread step.

    Attributes:
        was_ready: whether the device had ended the step that was settled last before it was asked;
            None without a GPU, or where there was none to settle.
    """

    def __init__(self):
        self._received: set[int] = set()
        self._step = 0
        self._names: list[str] = []
        self._keys: list[str] = []
        self._sums: Tensor | None = None
        self._on_host: Tensor | None = None
        self._copied: torch.cuda.Event | None = None
        self._signals: set[int] = set()
        self.was_ready: bool | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Remembers SIGTERM and SIGUSR1 for the next step instead of dying of them."""

        previous = {
            number: signal.signal(number, lambda number, frame: self.receive(number))
            for number in SIGNALS
        }
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def receive(self, number: int) -> None:
        """Takes a signal, or what is to be taken as one; every rank hears of it."""
        self._received.add(number)

    def put(
        self, step: int, terms: dict[str, Tensor], keys: list[str], counts: Sequence[int] = ()
    ) -> None:
        """Starts to watch a step: its scalar terms, its samples' keys and counts on this rank."""
        received, self._received = self._received, set()
        self._step, self._names, self._keys = step, list(terms), keys
        sums = torch.stack([term.float() for term in terms.values()])
        of_host = [float(number in received) for number in SIGNALS] + [float(n) for n in counts]
        if any(of_host):
            pinned = torch.tensor(of_host, pin_memory=sums.is_cuda)
            of_host = pinned.to(sums.device, non_blocking=True)
        else:
            of_host = sums.new_zeros(len(of_host))
        self._sums = torch.cat([sums, of_host])
        if world_size() > 1:
            dist.all_reduce(self._sums)
        self._start_copy()

    def _start_copy(self) -> None:
        """Copies the sums to the host behind what the device does by now, without waiting."""
        if not self._sums.is_cuda:
            self._on_host = self._sums
            return
        if self._on_host is None or self._on_host.shape != self._sums.shape:
            self._on_host = torch.empty(self._sums.shape, pin_memory=True)
            self._copied = torch.cuda.Event()
        self._on_host.copy_(self._sums, non_blocking=True)
        self._copied.record()

    def settle(self) -> WatchedStep | None:
        """Reads the watched step, if there is one that was not read.

        Raises:
            NonFiniteLoss: on every rank, if a term is not finite.
        """
        self.was_ready = None
        if self._sums is None:
            return None
        values = self._read()
        self._sums = None
        sums, values = values[: len(self._names)], values[len(self._names) :]
        flags, counts = values[: len(SIGNALS)], values[len(SIGNALS) :]
        terms = {name: total / world_size() for name, total in zip(self._names, sums, strict=True)}
        if not all(math.isfinite(value) for value in terms.values()):
            raise NonFiniteLoss(self._describe(terms))
        self._signals |= {number for number, flag in zip(SIGNALS, flags, strict=True) if flag}
        return WatchedStep(self._step, terms, [round(count) for count in counts])

    def _read(self) -> list[float]:
        """The sums, once they are on the host; what the device got to do since may go on."""
        if self._copied is not None:
            self.was_ready = self._copied.query()
            self._copied.synchronize()
        return self._on_host.tolist()

    def take_signals(self) -> set[int]:
        """The signals of settled steps that any rank received, each given once."""
        taken, self._signals = self._signals, set()
        return taken

    def is_told_to_stop(self) -> bool:
        """Whether any rank has received SIGTERM since the last step that told of it. A collective,
        for where no step follows."""
        return any(gather_objects(signal.SIGTERM in self._received | self._signals))

    def _describe(self, terms: dict[str, float]) -> str:
        listed = ", ".join(f"{name} {value:g}" for name, value in terms.items())
        samples = " ".join(key for keys in gather_objects(self._keys) for key in keys)
        return (
            f"the loss or the gradient of step {self._step} is not finite ({listed}); the last "
            f"checkpoint is intact; the batch's samples: {samples}"
        )
