"""Copies a batch's pixels to a GPU beside the step that runs there."""

import torch
from torch import Tensor

from aclip.data.batch import Batch


class SideStream:
    """A CUDA stream of its own, on which the pixels of the next batch are copied.

    `send` is called in the thread that prepares batches, `receive` in the one that takes steps.
    Tokens and all else stay in pinned memory, since parts of the step read them on the host.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._stream = torch.cuda.Stream(device)

    def send(self, batch: Batch) -> tuple[Batch, torch.cuda.Event]:
        """Starts the copies of a batch in pinned memory; the event tells that they are made."""
        with torch.cuda.stream(self._stream):
            batch = batch.map_pixels(lambda pixels: pixels.to(self.device, non_blocking=True))
        copied = torch.cuda.Event()
        copied.record(self._stream)
        return batch, copied

    def receive(self, batch: Batch, copied: torch.cuda.Event) -> Batch:
        """The batch, for the current stream: it waits for the copies, and the host does not."""
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(copied)

        def keep(pixels: Tensor) -> Tensor:
            # Made for the side stream, whose next copy must not overwrite what the step reads.
            pixels.record_stream(stream)
            return pixels

        return batch.map_pixels(keep)
