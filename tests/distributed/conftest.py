"""Makes the helper beside this file available to test modules, which cannot import each other."""

import importlib.util
from pathlib import Path

import pytest


def _load(name: str):
    path = Path(__file__).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"aclip_tests_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_helper = _load("run_distributed")


@pytest.fixture
def run_distributed():
    """`run_distributed(fn, world_size, *args, timeout=120)`; see run_distributed.py."""
    return _helper.run_distributed
