"""Whole decoded images in a batch: a worker that ships one image instead of its resampled views
saves most of its time. The views are cut on the device (device_views.py).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import get_worker_info

from aclip.data.images.decode import decode_pixels
from aclip.data.images.views import Box
from aclip.data.shards.listing import Skip


@dataclass(frozen=True, slots=True)
class WholeImage:
    """One decoded image.

    Attributes:
        pixels: (h, w, 3) uint8, reduced `factor` times.
        height, width: the image's size before it was reduced; boxes refer to it.
        ssl_boxes: boxes of the S views for SimCLR alone, if the recipe has such views.
        ssl_flips: whether each of these views is mirrored.
    """

    pixels: np.ndarray
    height: int
    width: int
    factor: int = 1
    ssl_boxes: list[Box] | None = None
    ssl_flips: list[bool] | None = None


class PixelBuffer:
    """Memory that the images of one part of a batch are decoded into, one behind the other.

    It is a little larger than the previous part needed. So most parts, except the first one, are
    handed over without a copy.
    """

    SPARE = 1.1

    def __init__(self):
        self._capacity = 0
        self._start()

    def _start(self) -> None:
        self._bytes = _new_bytes(self._capacity)
        self._array = self._bytes.numpy()
        self._used = 0

    def room(self, num_bytes: int) -> np.ndarray | None:
        """The next free bytes, or None if there are too few. They stay free until `keep`."""
        end = self._used + num_bytes
        return self._array[self._used : end] if end <= self._capacity else None

    def keep(self, pixels: np.ndarray) -> np.ndarray:
        """The pixels in the buffer, copied unless they lie there; unchanged if it has no room."""
        place = self.room(pixels.nbytes)
        if place is None:
            return pixels
        self._used += pixels.nbytes
        if not np.may_share_memory(pixels, place):
            place[:] = pixels.reshape(-1)
        return place.reshape(pixels.shape)

    def take(self, arrays: list[np.ndarray]) -> Tensor:
        """All bytes of the arrays in their order, (bytes,) uint8. They are copied only if some of
        the arrays found no room in the buffer. The buffer is empty afterwards."""
        num_bytes = sum(array.nbytes for array in arrays)
        if self._used == num_bytes:
            taken = self._bytes[:num_bytes]
        else:
            taken = _new_bytes(num_bytes)
            np.concatenate([array.reshape(-1) for array in arrays], out=taken.numpy())
            self._capacity = round(self.SPARE * num_bytes)
        self._start()
        return taken


def _new_bytes(count: int) -> Tensor:
    """(count,) uint8. A worker process takes shared memory, or DataLoader would copy it there."""
    if get_worker_info() is None or not count:
        return torch.empty(count, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(count, device="cpu")
    return torch.empty(0, dtype=torch.uint8).set_(storage)


def read_whole_image(
    content: bytes, min_side: int, max_side: int, buffer: PixelBuffer | None = None
) -> WholeImage | Skip:
    """Decodes an image, into the buffer if it has room.

    An image with a side over `max_side` is reduced by a whole factor: each new pixel averages a
    factor x factor square; squares at the right and lower edge may be smaller.
    """

    def room(height: int, width: int) -> np.ndarray | None:
        is_kept = buffer is not None and max(height, width) <= max_side
        return buffer.room(3 * height * width) if is_kept else None

    pixels = decode_pixels(content, min_side, room)
    if isinstance(pixels, Skip):
        return pixels
    height, width = pixels.shape[:2]
    factor = -(-max(height, width) // max_side)
    if factor > 1:
        pixels = np.asarray(Image.fromarray(pixels).reduce(factor))
    if buffer is not None:
        pixels = buffer.keep(pixels)
    return WholeImage(pixels, height, width, factor)


@dataclass(frozen=True)
class WholeImages:
    """B images, each of its own size."""

    pixels: Tensor
    """(P, 3) uint8, all pixels of the first image row by row, then of the next"""
    sizes: Tensor
    """(B, 3) int32, each image's (height, width, factor) after it was reduced; stays on the CPU"""
    ssl_boxes: Tensor | None
    """(B, S, 4) int32, boxes as in Batch.student_boxes"""
    ssl_flips: Tensor | None
    """(B, S) bool"""

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def ends(self) -> Tensor:
        """(B,) int64: where in `pixels` each image ends."""
        return (self.sizes[:, 0].long() * self.sizes[:, 1]).cumsum(0)

    def __getitem__(self, part: slice) -> "WholeImages":
        bounds = [0, *self.ends.tolist()]
        start, stop, _ = part.indices(len(self))
        return WholeImages(
            self.pixels[bounds[start] : bounds[stop]],
            self.sizes[part],
            None if self.ssl_boxes is None else self.ssl_boxes[part],
            None if self.ssl_flips is None else self.ssl_flips[part],
        )

    def to(self, device: torch.device | str) -> "WholeImages":
        """Moves all tensors but `sizes`; asynchronous from pinned memory."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def map(self, change: Callable[[Tensor], Tensor]) -> "WholeImages":
        """All tensors but `sizes`, changed by `change`."""

        def changed(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else change(tensor)

        return replace(
            self,
            pixels=change(self.pixels),
            ssl_boxes=changed(self.ssl_boxes),
            ssl_flips=changed(self.ssl_flips),
        )


def stack_images(
    images: list[WholeImage | None], buffer: PixelBuffer | None = None
) -> WholeImages | None:
    """Joins the images of one part of a batch, without a copy if they lie in the buffer."""
    if images[0] is None:
        return None
    pixels = (buffer or PixelBuffer()).take([image.pixels for image in images])
    has_ssl = images[0].ssl_boxes is not None
    return WholeImages(
        pixels.view(-1, 3),
        torch.tensor(
            [(*image.pixels.shape[:2], image.factor) for image in images], dtype=torch.int32
        ),
        torch.tensor([image.ssl_boxes for image in images], dtype=torch.int32) if has_ssl else None,
        torch.tensor([image.ssl_flips for image in images]) if has_ssl else None,
    )


def join_images(parts: list[WholeImages | None], pin: bool) -> WholeImages | None:
    """Joins consecutive parts, with one copy, into pinned memory if asked."""
    if parts[0] is None:
        return None

    def cat(tensors: list[Tensor | None]) -> Tensor | None:
        if tensors[0] is None:
            return None
        shape = (sum(len(tensor) for tensor in tensors), *tensors[0].shape[1:])
        whole = torch.empty(shape, dtype=tensors[0].dtype, pin_memory=pin)
        return torch.cat(tensors, out=whole)

    return WholeImages(
        cat([part.pixels for part in parts]),
        torch.cat([part.sizes for part in parts]),
        cat([part.ssl_boxes for part in parts]),
        cat([part.ssl_flips for part in parts]),
    )
