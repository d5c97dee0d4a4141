"""Whole decoded images in a batch, and the views that are cut from them on the device.

A worker that ships one image instead of its resampled views saves most of its time. A view is
rows . image . columns, with the weights of Pillow's antialiased bilinear filter in two small
matrices, for all images of a batch at once.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import get_worker_info

from aclip.data.shards.listing import Skip
from aclip.data.views import Box, decode_pixels

IMAGES_AT_ONCE = 32
"""Padded to one size and resampled together; bounds the memory on the device."""


@dataclass(frozen=True, slots=True)
class Slot:
    """One image.

    Attributes:
        pixels: (h, w, 3) uint8, reduced `factor` times. height, width: of the image before that,
            which boxes refer to.
        ssl_boxes, ssl_flips: of the views for SimCLR alone, S of each, if there are any.
    """

    pixels: np.ndarray
    height: int
    width: int
    factor: int = 1
    ssl_boxes: list[Box] | None = None
    ssl_flips: list[bool] | None = None


class SlotBuffer:
    """Memory that the images of one part of a batch are decoded into, one behind the other.

    As large as the part before needed, and some; so all but the first are handed over as they lie.
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
        """The next bytes, if there are as many; they count as free until `keep`."""
        end = self._used + num_bytes
        return self._array[self._used : end] if end <= self._capacity else None

    def keep(self, pixels: np.ndarray) -> np.ndarray:
        """The pixels, from now on in the buffer if it has room: where they lie, or moved there."""
        place = self.room(pixels.nbytes)
        if place is None:
            return pixels
        self._used += pixels.nbytes
        if not np.may_share_memory(pixels, place):
            place[:] = pixels.reshape(-1)
        return place.reshape(pixels.shape)

    def take(self, arrays: list[np.ndarray]) -> Tensor:
        """All bytes of the arrays in their order, (bytes,) uint8; a copy only where some of them
        found no room. Then begins anew."""
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
    """(count,) uint8; in a worker process in shared memory, or DataLoader would copy it there."""
    if get_worker_info() is None or not count:
        return torch.empty(count, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(count, device="cpu")
    return torch.empty(0, dtype=torch.uint8).set_(storage)


def make_slot(
    content: bytes, min_side: int, max_side: int, buffer: SlotBuffer | None = None
) -> Slot | Skip:
    """Decodes an image, into the buffer if it has room; one with a side over `max_side` is reduced
    by a whole factor, each pixel the mean of a square (at the right and lower edge of what is left
    of one)."""

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
    return Slot(pixels, height, width, factor)


@dataclass(frozen=True)
class Slots:
    """B images of sizes of their own."""

    pixels: Tensor
    """(P, 3) uint8, all pixels of the first image row by row, then of the next"""
    sizes: Tensor
    """(B, 3) int32, (height, width, factor) of each as it lies in `pixels`; stays on the CPU"""
    ssl_boxes: Tensor | None
    """(B, S, 4) int32, as Batch.student_boxes"""
    ssl_flips: Tensor | None
    """(B, S) bool"""

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def ends(self) -> Tensor:
        """(B,) int64: where in `pixels` each image ends."""
        return (self.sizes[:, 0].long() * self.sizes[:, 1]).cumsum(0)

    def __getitem__(self, part: slice) -> "Slots":
        bounds = [0, *self.ends.tolist()]
        start, stop, _ = part.indices(len(self))
        return Slots(
            self.pixels[bounds[start] : bounds[stop]],
            self.sizes[part],
            None if self.ssl_boxes is None else self.ssl_boxes[part],
            None if self.ssl_flips is None else self.ssl_flips[part],
        )

    def to(self, device: torch.device | str) -> "Slots":
        """Moves what is computed with; asynchronous from pinned memory."""

        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=True)

        return replace(
            self,
            pixels=move(self.pixels),
            ssl_boxes=move(self.ssl_boxes),
            ssl_flips=move(self.ssl_flips),
        )


def stack_slots(slots: list[Slot | None], buffer: SlotBuffer | None = None) -> Slots | None:
    """Joins the images of a part of a batch, without a copy if they lie in the buffer."""
    if slots[0] is None:
        return None
    pixels = (buffer or SlotBuffer()).take([slot.pixels for slot in slots])
    has_ssl = slots[0].ssl_boxes is not None
    return Slots(
        pixels.view(-1, 3),
        torch.tensor([(*slot.pixels.shape[:2], slot.factor) for slot in slots], dtype=torch.int32),
        torch.tensor([slot.ssl_boxes for slot in slots], dtype=torch.int32) if has_ssl else None,
        torch.tensor([slot.ssl_flips for slot in slots]) if has_ssl else None,
    )


def join_slots(parts: list[Slots | None], pin: bool) -> Slots | None:
    """Joins consecutive parts, with one copy, into pinned memory if asked."""
    if parts[0] is None:
        return None

    def cat(tensors: list[Tensor | None]) -> Tensor | None:
        if tensors[0] is None:
            return None
        shape = (sum(len(tensor) for tensor in tensors), *tensors[0].shape[1:])
        whole = torch.empty(shape, dtype=tensors[0].dtype, pin_memory=pin)
        return torch.cat(tensors, out=whole)

    return Slots(
        cat([part.pixels for part in parts]),
        torch.cat([part.sizes for part in parts]),
        cat([part.ssl_boxes for part in parts]),
        cat([part.ssl_flips for part in parts]),
    )


def cut_views(
    slots: Slots,
    student_boxes: Tensor,
    teacher_box: Tensor | None,
    resolution: int,
    teacher_resolution: int | None,
) -> dict[str, Tensor | None]:
    """Cuts the views of a batch where its images are.

    Args:
        slots: B images, on any device.
        student_boxes: (B, V, 4) int32, in pixels of the images before reduction, there.
        teacher_box: (B, 4) int32 likewise, or None.
        resolution, teacher_resolution: sides of the views, R and T pixels.

    Returns:
        student_views (B, V, 3, R, R), teacher_view (B, 3, T, T) or None, ssl_views (B, S, 3, R, R)
        or None; uint8, each within 1 level of what views.crop gives for an image not reduced.
    """
    wanted = {"student_views": (student_boxes, resolution)}
    if teacher_box is not None:
        wanted["teacher_view"] = (teacher_box.unsqueeze(1), teacher_resolution)
    if slots.ssl_boxes is not None:
        wanted["ssl_views"] = (slots.ssl_boxes, resolution)
    # In fp16 a pixel is exact, and weights so rounded move a view by less than half a level.
    dtype = torch.float16 if slots.pixels.is_cuda else torch.float32
    cut: dict[str, list[Tensor]] = {name: [] for name in wanted}
    for start in range(0, len(slots), IMAGES_AT_ONCE):
        rows = slice(start, start + IMAGES_AT_ONCE)
        images, sizes = _pad(slots[rows])
        for name, (boxes, side) in wanted.items():
            cut[name].append(_resample(images, sizes, boxes[rows], side, dtype))
    views = {"teacher_view": None, "ssl_views": None}
    views.update({name: torch.cat(parts) for name, parts in cut.items()})
    if views["teacher_view"] is not None:
        views["teacher_view"] = views["teacher_view"].squeeze(1)
    if views["ssl_views"] is not None:
        flips = slots.ssl_flips[:, :, None, None, None]
        views["ssl_views"] = torch.where(flips, views["ssl_views"].flip(-1), views["ssl_views"])
    return views


def _pad(slots: Slots) -> tuple[Tensor, Tensor]:
    """Images as (B, H, W, 3) uint8, padded to the largest with what is never read, and their sizes
    (B, 3) int64 beside them. No value is read back from the device."""
    device = slots.pixels.device
    height, width, _ = slots.sizes.amax(0).tolist()
    places = torch.cat([slots.sizes.long(), slots.ends.unsqueeze(1)], dim=1)
    if device.type == "cuda":
        places = places.pin_memory()
    places = places.to(device, non_blocking=True)
    heights, widths = places[:, 0], places[:, 1]
    first = (places[:, 3] - heights * widths).view(-1, 1, 1)
    y = torch.minimum(torch.arange(height, device=device), heights.view(-1, 1) - 1)
    x = torch.minimum(torch.arange(width, device=device), widths.view(-1, 1) - 1)
    ids = first + y.unsqueeze(2) * widths.view(-1, 1, 1) + x.unsqueeze(1)
    return slots.pixels[ids], places[:, :3]


def _resample(
    images: Tensor, sizes: Tensor, boxes: Tensor, side: int, dtype: torch.dtype
) -> Tensor:
    """(B, K, 3, side, side) uint8 of boxes (B, K, 4); products in `dtype`.

    Rounded once, so within half a level of the exact value. Pillow rounds after each axis and lies
    within one level of it, so the two are one level apart at most.
    """
    images = images.to(dtype)
    factors = sizes[:, 2].view(-1, 1)
    top, left, height, width = (boxes.float() / factors.unsqueeze(2)).unbind(2)
    rows = resampling_weights(top, height, sizes[:, :1], images.shape[1], side).to(dtype)
    columns = resampling_weights(left, width, sizes[:, 1:2], images.shape[2], side).to(dtype)
    narrow = torch.einsum("bkxw,bhwc->bkhxc", columns, images)
    views = torch.einsum("bkyh,bkhxc->bkcyx", rows, narrow).round_().clamp_(0, 255)
    return views.to(torch.uint8).contiguous()


def resampling_weights(
    start: Tensor, length: Tensor, size: Tensor, padded: int, side: int
) -> Tensor:
    """Weights of Pillow's BILINEAR filter along one axis, antialiased where it shrinks.

    Args:
        start, length: (B, K) float, interval of the axis that becomes `side` pixels.
        size: (B, 1) int, pixels of each image's axis. padded: of the tensor's, at least as many.

    Returns:
        (B, K, side, padded) fp32; each row sums to 1 and is 0 from the image's size on.

    Source: precompute_coeffs in Pillow's src/libImaging/Resample.c.
    """
    start, length, size = (value.unsqueeze(-1) for value in (start, length, size))
    scale = length / side
    support = scale.clamp_min(1)  # of the triangle, each way
    center = start + (torch.arange(side, device=start.device) + 0.5) * scale  # (B, K, side)
    first = (center - support + 0.5).trunc().clamp_min(0).unsqueeze(-1)
    last = torch.minimum((center + support + 0.5).trunc(), size).unsqueeze(-1)
    pixel = torch.arange(padded, device=start.device)
    weights = 1 - (pixel + 0.5 - center.unsqueeze(-1)).abs() / support.unsqueeze(-1)
    weights = weights.clamp_min(0) * ((pixel >= first) & (pixel < last))
    return weights / weights.sum(-1, keepdim=True)
