"""What this process may use of its machine: cores, GPUs, shared memory. Each is looked at before it
costs time."""

import math
import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

from aclip.errors import ConfigError

CGROUPS = Path("/sys/fs/cgroup")
DEVICE_FILES = Path("/dev")
DRIVER_FILE = Path("/proc/driver/nvidia/version")
SHARED_MEMORY = Path("/dev/shm")
VISIBLE = "CUDA_VISIBLE_DEVICES"


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


def check_gpus() -> None:
    """Refuses a machine with GPUs on which a run would take the CPU, or fail in its first step.

    The CPU is taken on purpose where there is no GPU, where CUDA_VISIBLE_DEVICES is empty or -1,
    and where DS_ACCELERATOR says so. DeepSpeed alone heeds that; the GPUs are then hidden from
    torch too, or the loader would prepare batches for them.

    Raises:
        ConfigError: torch can't use a GPU that is there; what Triton compiles with is missing; or
            there are fewer GPUs than ranks on this machine.
    """
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        os.environ[VISIBLE] = ""
    if os.environ.get(VISIBLE, "0").strip() in ("", "-1") or "DS_ACCELERATOR" in os.environ:
        return
    import torch

    if torch.cuda.is_available():
        problems = compiler_problems()
        if problems:
            raise ConfigError("; ".join(problems))
        _check_own_device(torch.cuda.device_count())
    elif has_gpu():
        raise ConfigError(_why_unusable(torch))


def has_gpu() -> bool:
    """Whether the driver's device files or nvidia-smi show a GPU."""
    if any(re.fullmatch(r"nvidia\d+", path.name) for path in DEVICE_FILES.glob("nvidia*")):
        return True
    if shutil.which("nvidia-smi") is None:
        return False
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    return listed.returncode == 0 and "GPU " in listed.stdout


def compiler_problems() -> list[str]:
    """A sentence for each thing that is missing of what Triton builds its launcher with."""
    problems = []
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        problems.append("no C compiler is found, which Triton needs; install gcc or set CC")
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    if not header.is_file():
        problems.append(f"{header} is missing, which Triton needs; install python3-dev")
    return problems


def ranks_of_machine() -> int | None:
    """How many ranks run on this machine; torchrun and deepspeed tell it, each by its own name."""
    ranks = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")
    return None if ranks is None else max(1, int(ranks))


def own_device_index(num_devices: int) -> int:
    """The GPU of this rank among those that it sees: its own number on this machine, or the only
    one, where each rank is shown one."""
    return 0 if num_devices == 1 else int(os.environ.get("LOCAL_RANK", 0))


def check_shared_memory(num_bytes: int, what: str) -> None:
    """Refuses a /dev/shm that is too small for what the processes of this machine put there.

    Raises:
        ConfigError: names both sizes. In a container the default is often 64 MiB, and a process
            that writes beyond it dies of a bus error.
    """
    if not SHARED_MEMORY.is_dir():
        return
    free = shutil.disk_usage(SHARED_MEMORY).free
    if free < num_bytes:
        raise ConfigError(
            f"{SHARED_MEMORY} has {free / 2**30:.2f} GiB free, but {what} put up to "
            f"{num_bytes / 2**30:.2f} GiB there; start the container with --ipc=host or "
            f"--shm-size={-(-num_bytes // 2**30) + 1}g, or set data.workers=0"
        )


def _check_own_device(num_devices: int) -> None:
    ranks = ranks_of_machine() or 1
    index = int(os.environ.get("LOCAL_RANK", 0))
    if num_devices > 1 and index >= num_devices:
        raise ConfigError(
            f"rank {index} of this machine's {ranks} has no GPU of its own, since only "
            f"{num_devices} are visible; start as many ranks as GPUs, or change {VISIBLE}"
        )


def _why_unusable(torch) -> str:
    cpu = f"set {VISIBLE}= to run on the CPU"
    if torch.version.cuda is None:
        return (
            f"this machine has a GPU, but torch {torch.__version__} is a build without CUDA; "
            f"install one with CUDA (see https://pytorch.org), or {cpu}"
        )
    if VISIBLE in os.environ:
        shown = f"{VISIBLE} is {os.environ[VISIBLE]}, which may name none of them; change it, "
    else:
        shown = ""
    return (
        f"this machine has a GPU, but torch {torch.__version__} for CUDA {torch.version.cuda} "
        f"can't use it with the driver {driver_version()}; {shown}install a newer driver (CUDA 13 "
        "needs version 580), or torch for an older CUDA (pip install torch --index-url "
        f"https://download.pytorch.org/whl/cu126), or {cpu}"
    )


def driver_version() -> str:
    """The version of the NVIDIA driver, or `of unknown version`."""
    try:
        found = re.search(r"\d+\.\d+(\.\d+)?", DRIVER_FILE.read_text())
    except OSError:
        found = None
    return found.group() if found else "of unknown version"
