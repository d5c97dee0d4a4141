"""What the host's allocator does with freed memory, on Linux with glibc.

By default glibc returns some of it to the system and keeps some, depending on its size and its
place on the heap. Returned memory is filled with zeros before it is used again, which takes up to
an eighth of a step's time on a CPU, and none in another step of the same kind.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

OWN_PAGES = 64 * 1024
"""Allocations of at least so many bytes are mapped separately, and returned when freed."""
MOST_IN_HEAP = 32 * 2**20
"""glibc itself raises that threshold up to this size."""
MOST_MAPPED = 65536
"""The most allocations that are mapped separately."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # from malloc.h


@contextmanager
def own_pages() -> Iterator[None]:
    """Tensors get pages of their own, so that the process's memory shows what is held; allocating
    is slow."""
    _set(M_MMAP_THRESHOLD, OWN_PAGES)
    try:
        yield
    finally:
        _set(M_MMAP_THRESHOLD, MOST_IN_HEAP)
        _set(M_TRIM_THRESHOLD, 2 * MOST_IN_HEAP)


@contextmanager
def kept_pages() -> Iterator[None]:
    """Freed memory stays with the process, as on a GPU, so that only computing takes time."""
    _set(M_MMAP_MAX, 0)
    _set(M_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        _set(M_MMAP_MAX, MOST_MAPPED)
        _set(M_TRIM_THRESHOLD, 2 * MOST_IN_HEAP)
        give_back()


def give_back() -> None:
    """Gives all freed memory back to the system."""
    ctypes.CDLL(None).malloc_trim(0)


def _set(parameter: int, value: int) -> None:
    ctypes.CDLL(None).mallopt(parameter, value)
