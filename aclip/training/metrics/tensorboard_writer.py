"""TensorBoard's file of a run; its axis is samples."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from aclip.distributed import say


class TensorBoard:
    """Writes what it is given until a write fails, after which TensorBoard's writer can't go on.

    Args:
        folder: where its files lie.
        purge_from: what an earlier process wrote there from so many samples on is not shown.
    """

    def __init__(self, folder: Path, purge_from: int):
        # Here, because it takes seconds that other ranks need not wait for.
        from torch.utils.tensorboard import SummaryWriter

        self._writer: SummaryWriter | None = None
        with self._ends_at_an_error():
            self._writer = SummaryWriter(str(folder), purge_step=purge_from)

    def log(self, numbers: dict[str, float], samples: int) -> None:
        if self._writer is not None:
            with self._ends_at_an_error():
                for name, number in numbers.items():
                    self._writer.add_scalar(name, number, samples)

    def log_image(self, tag: str, array: np.ndarray, samples: int) -> None:
        """Adds a (H, W, 3) uint8 picture, and flushes."""
        if self._writer is not None:
            with self._ends_at_an_error():
                self._writer.add_image(tag, array, samples, dataformats="HWC")
                self._writer.flush()

    def flush(self) -> None:
        """Lets readers see what was logged."""
        if self._writer is not None:
            with self._ends_at_an_error():
                self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            with self._ends_at_an_error():
                self._writer.close()

    @contextmanager
    def _ends_at_an_error(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._writer = None
            say(f"TensorBoard's file ends here ({error}); the run goes on")
