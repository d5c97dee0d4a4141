"""Copies of tensors in the host's memory, made in few and large pieces."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

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


def start_copy(own: Tensor) -> Tensor:
    """Hands a tensor that nobody else changes to the host.

    On a GPU it is copied into pinned memory, which torch keeps and uses again for the next copy
    of that size; the copy is complete after `finish_copies`. On the CPU it is the tensor itself.
    """
    if not own.is_cuda:
        return own
    host = torch.empty(own.shape, dtype=own.dtype, pin_memory=True)
    return host.copy_(own, non_blocking=True)


def finish_copies() -> None:
    """Waits until everything that was begun with `start_copy` is in the host's memory."""
    if torch.cuda.is_initialized():
        torch.cuda.current_stream().synchronize()


def host_copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of tensors of one dtype in host memory of their own, also where they are there."""
    copies = {}
    for names in bounded(tensors, lambda name: tensors[name].numel()):
        flat = start_copy(torch.cat([tensors[name].flatten() for name in names]))
        parts = flat.split([tensors[name].numel() for name in names])
        for name, part in zip(names, parts, strict=True):
            copies[name] = part.view(tensors[name].shape)
    finish_copies()
    return copies
