"""The peak of a step on the host, against tensors of known size."""

import subprocess
import sys

import pytest

MEASURE = """
import threading
import torch
from aclip.benchmarks.host_pages import own_pages
from aclip.benchmarks.peak_memory import peak_bytes
torch.set_num_threads(1)

MIB = 2**20

def step():
    first = torch.ones(20 * MIB, dtype=torch.uint8)
    held = [first.clone()]  # 48 MiB with what rests
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    small = [torch.ones(1000, dtype=torch.uint8) for _ in range(3000)]
    del first  # 28 MiB and the small ones, about 31
    second = torch.ones(9 * MIB, dtype=torch.uint8)

with own_pages():
    resting = torch.ones(8 * MIB, dtype=torch.uint8)
    step()
    print(peak_bytes(step, torch.device("cpu")) / MIB)
"""


def test_peak_counts_what_rests_what_is_freed_elsewhere_and_nothing_twice():
    # A process of its own, since the allocator stays as it is set.
    command = [sys.executable, "-c", MEASURE]
    measured = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert measured.returncode == 0, measured.stderr
    assert float(measured.stdout) == pytest.approx(48, abs=1)
