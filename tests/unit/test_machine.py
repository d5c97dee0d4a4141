"""How many cores a process may use: the affinity, and the quota of control groups."""

import os
from pathlib import Path

import pytest
import torch

from aclip import distributed, machine
from aclip.data import loader


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
