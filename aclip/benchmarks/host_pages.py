"""How the host's allocator deals with memory that is freed. Linux with glibc.

By itself glibc gives some of it back to the system and keeps some, by its size and its place on the
heap. What was given back has to be filled with zeros before it can be used again, which is up to an
eighth of a step on a CPU, and of another step of the same kind nothing.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

OWN_PAGES = 64 * 1024
"""Bytes: allocations of at least this size are mapped separately and returned to the system when
freed."""
MOST_IN_HEAP = 32 * 2**20  # up to which glibc raises that threshold by itself
MOST_MAPPED = 65536  # allocations with pages of their own
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # of malloc.h


@contextmanager
def own_pages() -> Iterator[None]:
    """Tensors get pages of their own, so that memory tells what is held; allocating is slow."""
    _set(M_MMAP_THRESHOLD, OWN_PAGES)
    try:
        yield
    finally:
        _set(M_MMAP_THRESHOLD, MOST_IN_HEAP)
        _set(M_TRIM_THRESHOLD, 2 * MOST_IN_HEAP)


@contextmanager
def kept_pages() -> Iterator[None]:
    """Freed memory stays with the process, as a GPU's does; time is that of computing alone."""
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
