"""On each node: starts processes, and ends them when they or the supervisor fail.

The supervisor's standard input comes through the remote shell: first a line of JSON, {"folder",
"environment", "commands": [{"arguments", "environment"}], "lost_after"}; then a byte now and then
as a sign of life: ALIVE, or TERMINATE to send the ranks SIGTERM too, or CHECKPOINT for SIGUSR1. At
its end, or after `lost_after` seconds of silence, everything started here is killed, so that
neither a dead supervisor nor a cut network leaves a process behind.
"""

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

LOOK = 0.2
PR_SET_PDEATHSIG = 1
LOST = 1
ALIVE, TERMINATE, CHECKPOINT = b"\n", b"T", b"C"
SIGNALS = {TERMINATE: signal.SIGTERM, CHECKPOINT: signal.SIGUSR1}


def main() -> int:
    """Returns the first status of a process that is not 0; 128 + n for a signal n."""
    # Unbuffered: a buffer would swallow the signals that follow the line.
    with open(0, "rb", buffering=0, closefd=False) as supervisor:
        spec = json.loads(supervisor.readline())
    os.chdir(spec["folder"])
    # ssh gives a bare PATH; what is installed beside this Python belongs to it.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    environment = {**os.environ, "PATH": path, **spec["environment"]}
    processes: list[subprocess.Popen] = []
    # The node itself, such as its scheduler, may ask to stop just as the supervisor does.
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, lambda *_: _signal_ranks(processes, signal.SIGTERM))
    status, reason = LOST, None
    try:
        for command in spec["commands"]:
            processes.append(_start(command, environment))
        status, reason = _watch(processes, spec["lost_after"])
    finally:
        _kill(processes)
    if reason is not None:
        with contextlib.suppress(OSError):  # the connection to the log may be what broke
            os.set_blocking(1, False)
            os.write(1, f"[node] the supervisor {reason}: all processes were killed\n".encode())
    return status


def _start(command: dict, environment: dict) -> subprocess.Popen:
    libc = ctypes.CDLL(None)

    def die_with_agent() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    return subprocess.Popen(
        command["arguments"],
        env={**environment, **command.get("environment", {})},
        stdin=subprocess.DEVNULL,
        start_new_session=True,  # one process group, so that its end takes all with it
        preexec_fn=die_with_agent,
    )


def _watch(processes: list[subprocess.Popen], lost_after: float) -> tuple[int, str | None]:
    """Waits for an end: its status, and what became of the supervisor if that is the reason."""
    heard = time.monotonic()
    while True:
        statuses = [process.poll() for process in processes]
        failed = [status for status in statuses if status]
        if failed:
            return failed[0] if failed[0] > 0 else 128 - failed[0], None
        if all(status == 0 for status in statuses):
            return 0, None
        readable, _, _ = select.select([0], [], [], LOOK)
        if readable:
            received = os.read(0, 4096)
            if not received:
                return LOST, "is gone"
            heard = time.monotonic()
            for byte, number in SIGNALS.items():
                if byte in received:
                    _signal_ranks(processes, number)
        if time.monotonic() - heard > lost_after:
            return LOST, f"was silent for {lost_after:g} s"


def _signal_ranks(processes: list[subprocess.Popen], number: int) -> None:
    """Signals the children of the launchers, since a launcher kills its ranks 30 s after its own
    SIGTERM, which may be too early for a checkpoint. A launcher without ranks yet gets the signal
    itself, so that it starts none."""
    for process in processes:
        ranks = _children(process.pid)
        if not ranks and number == signal.SIGTERM:
            ranks = [process.pid]
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank, number)


def _children(pid: int) -> list[int]:
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:
        return []
    return [int(word) for word in text.split()]


def _kill(processes: list[subprocess.Popen]) -> None:
    """Kills whole process groups, which still hold ranks and data workers of a launcher that is
    gone."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    for process in processes:
        process.wait()


if __name__ == "__main__":
    sys.exit(main())
