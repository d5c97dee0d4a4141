"""The choice of backend."""

import pytest
import torch

from aclip.kernels import common


def test_cpu_tensors_take_the_reference_unless_triton_interprets(monkeypatch):
    monkeypatch.delenv("ACLIP_KERNELS", raising=False)
    monkeypatch.setattr(common, "INTERPRET", False)
    assert not common.use_triton(torch.empty(0))
    monkeypatch.setattr(common, "INTERPRET", True)
    assert common.use_triton(torch.empty(0))


def test_the_reference_can_be_forced(monkeypatch):
    monkeypatch.setattr(common, "INTERPRET", True)
    monkeypatch.setenv("ACLIP_KERNELS", "reference")
    assert not common.use_triton(torch.empty(0))


def test_another_backend_is_refused_with_its_name(monkeypatch):
    monkeypatch.setenv("ACLIP_KERNELS", "cuda")
    with pytest.raises(ValueError, match="ACLIP_KERNELS is 'cuda'"):
        common.use_triton(torch.empty(0))
