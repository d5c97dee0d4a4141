"""Processes of a run under test, found by their ancestors and what they were started with."""

import os
import signal
import time
from pathlib import Path


def children(pid: int) -> list[int]:
    """The processes that a process has started, of all its threads."""
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += [int(word) for word in path.read_text().split()]
        except OSError:
            continue
    return found


def descendants(pid: int) -> list[int]:
    """Children, their children and so on."""
    found = children(pid)
    return found + [each for child in found for each in descendants(child)]


def arguments_of(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")[:-1]
    except OSError:
        return []


def is_running(pid: int) -> bool:
    """Whether it is there and not merely unburied."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def still_running(pids, seconds: float) -> list[int]:
    """Those that have not ended after at most so long; even SIGKILL takes a moment."""
    deadline = time.monotonic() + seconds
    while running := [pid for pid in pids if is_running(pid)]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    return running


def ranks(pid: int, local_rank: int | None = None) -> list[int]:
    """The ranks among a launcher's descendants; data workers have the same command line."""
    found = []
    for process in descendants(pid):
        words = arguments_of(process)
        wanted = local_rank is None or f"--local_rank={local_rank}" in words
        if wanted and any(word.endswith("pretrain.py") for word in words):
            parent = _parent(process)
            if "deepspeed.launcher.launch" in arguments_of(parent):
                is_rank = any(word.startswith("--local_rank=") for word in words)
                found += [process] if is_rank else []
    return found


def signal_all(pids: list[int], number: int = signal.SIGKILL) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    except OSError:
        return 0
