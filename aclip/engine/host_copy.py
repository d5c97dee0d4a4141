"""Copies of tensors in the host's memory, made in few and large pieces."""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

MOST_ELEMENTS = 1 << 25
"""Elements that are joined and copied at once, unless one tensor alone has more."""

Item = TypeVar("Item")


def bounded(items: Iterable[Item], num_elements: Callable[[Item], int]) -> Iterator[list[Item]]:
    """Cuts items, in their order, into lists of at most MOST_ELEMENTS elements together."""
    together: list[Item] = []
    room = MOST_ELEMENTS
    for item in items:
        if together and num_elements(item) > room:
            yield together
            together, room = [], MOST_ELEMENTS
        together.append(item)
        room -= num_elements(item)
    if together:
        yield together


class Room(NamedTuple):
    """What HostBuffers.take is asked for."""

    num_elements: int
    dtype: torch.dtype
    pinned: bool


class HostBuffers:
    """Host memory for copies, which is kept and used again for the next ones.

    On a CPU a copy into memory that was in use before takes a quarter of the time, since fresh
    memory is filled with zeros first; pinned memory takes still longer to make.
    """

    def __init__(self):
        self._kept: list[Tensor] = []
        self._num_taken = 0

    def prepare(self, rooms: list[Room]) -> None:
        """Takes memory from the system for what is going to be taken, in that order."""
        for room in rooms:
            taken = self.take(*room)
            if not room.pinned:
                taken.zero_()
        self.start_again()

    def start_again(self) -> None:
        """What was taken so far is given away again: nobody may read it any more."""
        self._num_taken = 0

    def take(self, num_elements: int, dtype: torch.dtype, pinned: bool) -> Tensor:
        """(num_elements,) with any values: the same memory after each start, if asked alike."""
        place = self._num_taken
        self._num_taken += 1
        kept = self._kept[place] if place < len(self._kept) else None
        if kept is None or (kept.numel(), kept.dtype) != (num_elements, dtype):
            self._kept[place:] = []  # before new memory is asked for
            del kept
            self._kept.append(torch.empty(num_elements, dtype=dtype, pin_memory=pinned))
        return self._kept[place]


def start_copy(device_copy: Tensor, buffers: HostBuffers) -> Tensor:
    """Hands a flat tensor on a GPU to the host; it is there after `finish_copies`."""
    host = buffers.take(device_copy.numel(), device_copy.dtype, pinned=True)
    return host.copy_(device_copy, non_blocking=True)


def finish_copies() -> None:
    """Waits until everything that was begun with `start_copy` is in the host's memory."""
    if torch.cuda.is_initialized():
        torch.cuda.current_stream().synchronize()


def rooms_of_copies(tensors: dict[str, Tensor]) -> list[Room]:
    """What `host_copies` takes of the buffers."""
    return [
        Room(sum(each.numel() for each in some), some[0].dtype, some[0].is_cuda)
        for some in bounded(tensors.values(), Tensor.numel)
    ]


def host_copies(tensors: dict[str, Tensor], buffers: HostBuffers) -> dict[str, Tensor]:
    """Copies of tensors of one dtype in the buffers, also of those that are on the host."""
    copies = {}
    for names in bounded(tensors, lambda name: tensors[name].numel()):
        flats = [tensors[name].flatten() for name in names]
        sizes = [flat.numel() for flat in flats]
        if flats[0].is_cuda:
            host = start_copy(torch.cat(flats), buffers)
        else:
            host = buffers.take(sum(sizes), flats[0].dtype, pinned=False)
            torch.cat(flats, out=host)
        for name, part in zip(names, host.split(sizes), strict=True):
            copies[name] = part.view(tensors[name].shape)
    finish_copies()
    return copies
