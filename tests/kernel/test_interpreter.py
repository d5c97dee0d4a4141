"""Runs this folder's tests once more on the Triton kernels, interpreted on the CPU.

Triton reads TRITON_INTERPRET when a kernel is defined, so that takes a process of its own. What
passes there has equalled the slow formulas and the references on poisoned memory, forward and
backward, and has passed opcheck and compiled as one graph.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from aclip.kernels.common import INTERPRET

HERE = Path(__file__).parent
OPS = (
    ("attentive_pack", "contrastive_loss", "sigmoid_loss"),
    ("augment_views", "cls_attention_scores", "cluster_counts", "cut_views"),
)
"""Those of a line share a process."""


@pytest.mark.skipif(INTERPRET, reason="this is the interpreted run")
@pytest.mark.parametrize("ops", OPS, ids=", ".join)
def test_interpreted_kernels_pass_every_test_of_their_ops(ops):
    environment = {name: value for name, value in os.environ.items() if name != "ACLIP_KERNELS"}
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    # Arguments are refused before a kernel is chosen; those tests have nothing new to say here.
    files = [str(HERE / f"test_{op}.py") for op in ops]
    command = [sys.executable, "-m", "pytest", *files, "-q", "-x"]
    command += ["-p", "no:cacheprovider", "-k", "not wrong_arguments"]
    run = subprocess.run(
        command, env=environment, cwd=HERE.parents[1], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
