"""What this process may use of its machine."""

import math
import os
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """The cores that this process may use: its affinity, and the quota of its container."""
    cores = len(os.sched_getaffinity(0))
    quota = _cgroup_quota()
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def _cgroup_quota() -> float | None:
    """The cores that the strictest control group above this process grants; None without a limit.

    In version 2 each group has a file cpu.max, `MICROSECONDS PERIOD` or `max PERIOD`; in version 1
    the two numbers are files of the controller `cpu`, and -1 is no limit. Inside of a container the
    root of the mount is the container's own group.
    """
    quotas = []
    for controllers, group in _groups():
        roots = [CGROUPS / controllers] if controllers else [CGROUPS]
        for root in roots:
            inner = root / group.lstrip("/")
            for folder in (inner, *(p for p in inner.parents if p.is_relative_to(root)), root):
                quotas.append(_quota_of(folder))
    known = [quota for quota in quotas if quota is not None]
    return min(known, default=None)


def _groups() -> list[tuple[str, str]]:
    """(controllers, group) of each hierarchy that may limit cores; `` names version 2."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    parts = [line.split(":", 2) for line in lines if line.count(":") >= 2]
    return [(names, group) for _, names, group in parts if not names or "cpu" in names.split(",")]


def _quota_of(folder: Path) -> float | None:
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            words = " ".join((folder / name).read_text() for name in names).split()
            granted, period = (float(word) for word in words)
        except (OSError, ValueError):  # no such file, or `max`
            continue
        if granted > 0 and period > 0:
            return granted / period
    return None
