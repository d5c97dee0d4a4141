"""Throughput and data wait of the last steps."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class StepTimer:
    """Throughput and data-wait share of the last steps, as the host sees them.

        with timer.waiting():
            batch = next(batches)
        ...
        timer.step(images)

    On an accelerator the host runs ahead of the device; over a window of steps the times agree.

    Args:
        window: how many steps are looked back on.
        clock: gives the time in seconds.
    """

    def __init__(self, window: int = 50, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._steps = deque(maxlen=window)  # (seconds, seconds waited, images)
        self.reset()

    def reset(self) -> None:
        """Begins a step now; time since the last one, as for an evaluation, counts for no step."""
        self._start = self._clock()
        self._waited = 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        start = self._clock()
        try:
            yield
        finally:
            self._waited += self._clock() - start

    def step(self, images: int) -> None:
        """Ends a step of so many images over all ranks, and begins the next."""
        self._steps.append((self._clock() - self._start, self._waited, images))
        self.reset()

    @property
    def images_per_second(self) -> float | None:
        """Throughput over the window; None before the first step."""
        seconds = self._seconds()
        return sum(images for _, _, images in self._steps) / seconds if seconds else None

    @property
    def data_wait_percent(self) -> float | None:
        """Share of the window's time that waited for data; None before the first step."""
        seconds = self._seconds()
        return 100 * sum(waited for _, waited, _ in self._steps) / seconds if seconds else None

    def _seconds(self) -> float:
        return sum(seconds for seconds, _, _ in self._steps)
