"""The most memory that tensors take during a step, on a GPU or on the host."""

import gc
import re
from collections.abc import Callable
from pathlib import Path

import torch

from aclip.benchmarks.host_pages import give_back

RESET_PEAK = "5"  # see clear_refs in proc(5)


def peak_bytes(step: Callable[[], None], device: torch.device) -> int:
    """The most bytes that tensors hold while `step` runs, with those that were there before.

    On the host that holds only within `own_pages`, entered before the first large tensor is made.

    Args:
        step: has run before, so that what it allocates once is there.
    """
    gc.collect()
    on_gpu = device.type == "cuda"
    resting = torch.cuda.memory_allocated(device) if on_gpu else _bytes_of_tensors()
    return resting + peak_growth(step, device)


def peak_growth(step: Callable[[], None], device: torch.device) -> int:
    """Bytes at the peak of `step` on top of what was there before.

    On the host the kernel counts them: torch's profiler does not see what another thread frees,
    such as gloo's.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    # What was freed goes back to the system, or a step would reuse it unseen.
    give_back()
    Path("/proc/self/clear_refs").write_text(RESET_PEAK)
    before = _process_bytes("VmRSS")
    step()
    return _process_bytes("VmHWM") - before


def _bytes_of_tensors() -> int:
    """The bytes of all tensors on the host that Python can reach; shared storage counts once."""
    storages: dict[int, int] = {}
    for found in gc.get_objects():
        # Not isinstance(), which asks lazy modules and dead proxies for their class.
        if not issubclass(type(found), torch.Tensor):
            continue
        for tensor in (found, found.grad if found.is_leaf else None):
            if tensor is not None and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _process_bytes(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) * 1024
