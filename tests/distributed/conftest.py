"""`run_distributed` as a fixture; pyproject.toml puts this folder's helpers on the path."""

import pytest
import run_distributed as helper


@pytest.fixture
def run_distributed():
    """`run_distributed(fn, world_size, *args, timeout=120)`; see run_distributed.py."""
    return helper.run_distributed
