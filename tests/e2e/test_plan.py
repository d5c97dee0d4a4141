"""The planning script as a user starts it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).parents[2]


def plan(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "launch/plan.py", "--ds_config", "ds_configs/zero2.json", *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)


def test_prints_a_plan():
    finished = plan("--recipe", "aclip_vitb16", "--gpu", "h100", "train.epochs=50")
    assert finished.returncode == 0, finished.stderr
    for words in ("GFLOP a sample", "2 <-", "largest micro-batch", "GPU-hours"):
        assert words in finished.stdout
    # 50 epochs of 15 million images in steps of 4096
    assert "183,105 steps" in finished.stdout


def test_unknown_gpu_ends_with_one_sentence():
    finished = plan("--gpu", "h1000")
    assert finished.returncode == 2
    assert "error: --gpu is h1000" in finished.stderr
    assert "Traceback" not in finished.stderr
