"""What a node says of its GPUs where nvidia-smi knows less than usual, and who reads it."""

import json
import math
import os

import pytest

from aclip.ablation.devices import choose_devices
from aclip.nodes.doctor import format_table
from aclip.nodes.examined import Examined, gpu_problems
from aclip.nodes.hostfile import Host
from aclip.nodes.probe import gpus, shown_gpus


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """nvidia_smi(lines): what the command of that name prints."""

    def install(lines: str) -> None:
        script = tmp_path / "nvidia-smi"
        script.write_text(f"#!/bin/sh\ncat <<END\n{lines}\nEND\n")
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    return install


def test_memory_is_in_mib(nvidia_smi):
    nvidia_smi("NVIDIA A100, SXM, 3, 81920")
    assert gpus() == [{"name": "NVIDIA A100, SXM", "used": 3.0, "total": 81920.0}]


@pytest.mark.parametrize("value", ["[N/A]", "[Insufficient Permissions]"])
def test_a_gpu_whose_memory_is_unknown_counts_as_free(nvidia_smi, value):
    nvidia_smi(f"NVIDIA GB10, {value}, {value}\nNVIDIA GB10, 5000, {value}")
    answer = json.loads(json.dumps({"gpus": gpus()}))  # as it comes to the doctor
    first, second = answer["gpus"]
    assert first["name"] == "NVIDIA GB10"
    assert math.isnan(first["used"]) and math.isnan(first["total"])
    assert second["used"] == 5000 and math.isnan(second["total"])
    assert gpu_problems(Examined(Host("a", 1), "token", answer), with_gpus=True) == []
    (problem,) = gpu_problems(Examined(Host("a", 2), "token", answer), with_gpus=True)
    assert problem.startswith("GPU 1 is in use")
    versions = dict.fromkeys(("python", "aclip", "torch", "deepspeed", "cuda"), "1")
    answer |= {"versions": versions, "disk_bytes": 0, "shm_bytes": 0}
    assert "2 NVIDIA GB10" in format_table([Examined(Host("a", 2), "token", answer)])
    assert [device["CUDA_VISIBLE_DEVICES"] for device in choose_devices(None, 4)] == ["0"]


def test_an_ablation_takes_free_gpus_among_those_that_the_environment_shows(
    nvidia_smi, monkeypatch
):
    nvidia_smi("A, 70000, 81920\nA, 3, 81920\nA, 5, 81920")
    for value, names in ((None, ["1", "2"]), ("2, 0, 1", ["2", "1"]), ("0,2,-1,1", ["2"])):
        if value is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
        else:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        devices = choose_devices(None, 4)
        assert [device["CUDA_VISIBLE_DEVICES"] for device in devices] == names
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert choose_devices(2, 4) == [{"OMP_NUM_THREADS": "3"}] * 2


def test_only_the_gpus_that_the_environment_shows_are_asked_about(nvidia_smi):
    nvidia_smi("A, 70000, 81920\nA, 3, 81920\nA, 5, 81920")
    assert shown_gpus(gpus(), None) == gpus()
    shown = shown_gpus(gpus(), "2,0,7")
    assert [(gpu["id"], gpu["used"]) for gpu in shown] == [("2", 5.0), ("0", 70000.0)]
    (problem,) = gpu_problems(Examined(Host("a", 2), "token", {"gpus": shown}), with_gpus=True)
    assert problem.startswith("GPU 0 is in use")
    (uuid,) = shown_gpus(gpus(), "GPU-8a1f")
    assert uuid["id"] == "GPU-8a1f" and math.isnan(uuid["used"])
    assert shown_gpus(gpus(), "") == shown_gpus(gpus(), "-1") == []
    (problem,) = gpu_problems(Examined(Host("a", 3), "token", {"gpus": shown}), with_gpus=True)
    assert "shows 2 GPUs for slots=3" in problem and "CUDA_VISIBLE_DEVICES" in problem
