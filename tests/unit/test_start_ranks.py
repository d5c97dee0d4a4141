"""Which GPUs a node's ranks get, under DeepSpeed's own launcher."""

import os
import socket
import subprocess

import pytest

from aclip.errors import ConfigError
from aclip.nodes import start_ranks
from aclip.nodes.start_ranks import devices_of_ranks


@pytest.mark.parametrize(
    "value, devices",
    [
        (None, [0, 1]),
        ("3,1", ["3", "1"]),
        ("5, 6,7", ["5", "6"]),
        ("GPU-8a,MIG-3", ["GPU-8a", "MIG-3"]),
        ("", ["-1", "-1"]),
        ("-1", ["-1", "-1"]),
    ],
)
def test_ranks_get_the_gpus_that_the_environment_shows(value, devices):
    assert devices_of_ranks(2, value) == devices


@pytest.mark.parametrize("value", ["1", "0,-1,2"])  # CUDA reads up to the first -1
def test_fewer_gpus_than_slots_are_refused(value):
    with pytest.raises(ConfigError, match=f"CUDA_VISIBLE_DEVICES is {value}, which shows 1 GPUs"):
        devices_of_ranks(2, value)


def test_deepspeeds_launcher_hands_the_given_gpu_to_the_rank(tmp_path):
    """A stand-in for pretrain.py says what it finds; the launcher works alike without a GPU."""
    script = tmp_path / "script.py"
    names = "CUDA_VISIBLE_DEVICES", "RANK", "WORLD_SIZE", "MASTER_ADDR"
    script.write_text(f"import os\nprint('found', *(os.environ[name] for name in {names}))\n")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = ["--master_addr=127.0.0.1", f"--master_port={port}", str(script)]
    finished = subprocess.run(
        start_ranks.command({"node-1": 2, "node-2": 1}, 1, words),
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "1"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert "found 1 2 3 127.0.0.1" in finished.stdout.splitlines(), finished.stderr
