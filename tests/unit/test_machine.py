"""What a process may use: cores by affinity and quota, GPUs, shared memory."""

import os
from pathlib import Path

import pytest
import torch

from aclip import distributed, machine
from aclip.data import loader
from aclip.errors import ConfigError


@pytest.mark.parametrize(
    ("groups", "files", "cores"),
    [
        ("0::/", {}, 8),
        ("0::/", {"cpu.max": "max 100000"}, 8),
        ("0::/", {"cpu.max": "250000 100000"}, 3),  # 2.5 cores keep three threads busy
        ("0::/", {"cpu.max": "5000 100000"}, 1),
        ("0::/a/b", {"a/cpu.max": "200000 100000", "a/b/cpu.max": "400000 100000"}, 2),
        ("0::/not/mounted", {"cpu.max": "200000 100000"}, 2),
        ("0::/", {"cpu.max": "9900000 100000"}, 8),
        (
            "4:cpu,cpuacct:/job",
            {
                "cpu,cpuacct/job/cpu.cfs_quota_us": "300000",
                "cpu,cpuacct/job/cpu.cfs_period_us": "100000",
            },
            3,
        ),
        ("4:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
        ("5:memory:/x", {"cpu.max": "100000 100000"}, 8),
    ],
)
def test_usable_cores(tmp_path, monkeypatch, groups, files, cores):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content + "\n")
    read = Path.read_text
    monkeypatch.setattr(machine, "CGROUPS", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(
        Path,
        "read_text",
        lambda self: groups + "\n" if str(self) == "/proc/self/cgroup" else read(self),
    )
    assert machine.usable_cores() == cores


class FakeCuda:
    def __init__(self, devices):
        self.devices = devices

    def is_available(self):
        return self.devices > 0

    def device_count(self):
        return self.devices


@pytest.fixture
def on_machine(tmp_path, monkeypatch):
    """on_machine(files, devices, smi, **environment): a machine with these device files in /dev,
    on which torch sees so many GPUs and nvidia-smi prints `smi`."""
    monkeypatch.setattr(machine, "DEVICE_FILES", tmp_path / "dev")
    monkeypatch.setattr(machine, "DRIVER_FILE", tmp_path / "version")
    (tmp_path / "dev").mkdir()
    (tmp_path / "bin").mkdir()

    def set_up(files=(), devices=0, smi=None, **environment):
        for name in files:
            (tmp_path / "dev" / name).touch()
        if smi is not None:
            (tmp_path / "bin" / "nvidia-smi").write_text(f"#!/bin/sh\necho '{smi}'\n")
            (tmp_path / "bin" / "nvidia-smi").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
        for name in ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR", "LOCAL_RANK", "CC"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(torch, "cuda", FakeCuda(devices))
        monkeypatch.setattr(torch.version, "cuda", "13.0")

    return set_up


NVIDIA = ["nvidia0", "nvidiactl"]


@pytest.mark.parametrize(
    "facts",
    [
        {},
        {"files": ["nvidiactl", "nvidia-uvm"]},  # the driver without a GPU
        {"smi": "No devices were found"},
        {"files": NVIDIA, "CUDA_VISIBLE_DEVICES": ""},
        {"files": NVIDIA, "CUDA_VISIBLE_DEVICES": "-1"},
        {"files": NVIDIA, "DS_ACCELERATOR": "cpu"},
        {"files": NVIDIA, "devices": 4, "LOCAL_RANK": "3"},
        {"files": NVIDIA, "devices": 1, "LOCAL_RANK": "3"},  # a GPU of its own for each task
    ],
)
def test_machine_that_can_be_used_as_it_is(on_machine, facts):
    on_machine(**facts)
    machine.check_gpus()


def test_gpus_are_hidden_from_torch_where_deepspeed_takes_the_cpu(on_machine, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")  # so that it is as before behind this test
    for value, shown in (("cuda", None), ("cpu", "")):
        on_machine(files=NVIDIA, devices=2, DS_ACCELERATOR=value)
        machine.check_gpus()
        assert os.environ.get("CUDA_VISIBLE_DEVICES") == shown


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"files": NVIDIA}, ["CUDA 13.0", "the driver 535.129.03", "version 580", "cu126"]),
        (
            {"smi": "GPU 0: NVIDIA H100"},
            ["VISIBLE_DEVICES= to run on the CPU"],
        ),
        (
            {"files": NVIDIA, "CUDA_VISIBLE_DEVICES": "7"},
            ["CUDA_VISIBLE_DEVICES is 7, which may name none of them"],
        ),
        (
            {"files": NVIDIA, "devices": 2, "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "4"},
            ["rank 2 of this machine's 4", "only 2 are visible"],
        ),
    ],
)
def test_gpu_that_can_not_be_used_is_refused(on_machine, tmp_path, facts, words):
    on_machine(**facts)
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64  535.129.03  Thu Oct 19\n")
    with pytest.raises(ConfigError) as raised:
        machine.check_gpus()
    assert all(word in str(raised.value) for word in words), str(raised.value)


def test_gpu_without_a_compiler_is_refused(on_machine, tmp_path, monkeypatch):
    on_machine(files=NVIDIA, devices=1)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(machine.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    with pytest.raises(ConfigError, match="no C compiler is found.*Python.h is missing"):
        machine.check_gpus()


@pytest.mark.parametrize(("num_devices", "rank", "index"), [(8, "3", 3), (1, "3", 0), (1, "0", 0)])
def test_own_device(monkeypatch, num_devices, rank, index):
    monkeypatch.setenv("LOCAL_RANK", rank)
    assert machine.own_device_index(num_devices) == index


def test_shared_memory_that_is_too_small_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "SHARED_MEMORY", tmp_path)
    machine.check_shared_memory(1, "the data workers of 8 ranks")
    with pytest.raises(ConfigError) as raised:
        machine.check_shared_memory(2**60, "the data workers of 8 ranks")
    assert f"{tmp_path} has " in str(raised.value)
    assert "the data workers of 8 ranks put up to 1073741824.00 GiB there" in str(raised.value)
    assert "--shm-size=1073741825g" in str(raised.value)
    monkeypatch.setattr(machine, "SHARED_MEMORY", tmp_path / "absent")
    machine.check_shared_memory(2**60, "")


@pytest.mark.parametrize(
    ("environment", "threads", "workers"),
    [
        ({}, 6, 6),
        ({"LOCAL_SIZE": "2"}, 3, 3),  # as deepspeed says
        ({"LOCAL_WORLD_SIZE": "3", "WORLD_SIZE": "24"}, 2, 2),  # as torchrun does
        ({"LOCAL_SIZE": "9", "WORLD_SIZE": "9"}, 1, 1),
        ({"WORLD_SIZE": "2"}, 3, 6),
        ({"OMP_NUM_THREADS": "5"}, None, 6),
    ],
)
def test_ranks_share_the_usable_cores(monkeypatch, environment, threads, workers):
    for name in ("LOCAL_SIZE", "LOCAL_WORLD_SIZE", "WORLD_SIZE", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    given = []
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    for module in (distributed, loader):
        monkeypatch.setattr(module, "usable_cores", lambda: 6)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setenv("WORLD_SIZE", environment.get("WORLD_SIZE", "1"))
    distributed.default_to_one_rank()
    assert given == [threads] * (threads is not None)
    lanes = 5040  # every number up to 9 divides it
    per_rank = loader._cores_per_rank()
    assert loader.resolve_workers(None, lanes, 1, per_rank) == workers
