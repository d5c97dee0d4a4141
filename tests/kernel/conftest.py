"""Every test of this folder runs on three backends, chosen by where pytest is started.

Plain CPU: the references. TRITON_INTERPRET=1: the Triton kernels, interpreted (test_interpreter.py
starts that). A machine with a CUDA device: the Triton kernels, compiled.
"""

import pytest
import torch
from aclip.kernels.common import INTERPRET


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() and not INTERPRET else "cpu"


@pytest.fixture
def poisoned_empty(monkeypatch):
    """Fills what torch.empty and new_empty hand out, so that an element never written is seen."""

    def poison(tensor):
        return tensor.fill_(float("nan") if tensor.is_floating_point() else 77)

    originals = torch.empty, torch.empty_like, torch.Tensor.new_empty
    empty, empty_like, new_empty = originals
    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poison(new_empty(*a, **k)))


@pytest.fixture(autouse=True)
def one_thread_and_fresh_compiler():
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.compiler.reset()
