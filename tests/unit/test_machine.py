"""How many cores a process may use: the affinity, and the quota of control groups."""

import os
from pathlib import Path

import pytest

from aclip import machine


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
