"""Runs the parts of a check one after another: each a program of its own with a limit of time.

One that fails or runs into its limit is noted, and the next one runs.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from aclip.cli import show_duration

OK, FAILED, LEFT_OUT, RUNNING = "ok", "FAILED", "left out", "running"
LINES_OF_A_FAILURE = 25
LOOK = 0.2
"""Seconds between two looks at a part that runs."""
SECONDS_TO_END = 10.0
"""Between SIGTERM and SIGKILL, once a part has run into its limit."""


class CheckFailed(Exception):
    """A part has ended as it should, but what it left is not right; says what."""


@dataclass(frozen=True)
class Part:
    """A part of the check.

    Attributes:
        title: its name in the report.
        command: what is run.
        limit: seconds that it may take.
        status: how the program must end.
        check: gets the output of a program that has ended so, looks at what it left, and gives a
            remark for the report; any error is a failure of the part.
        stop_when: SIGTERM goes to the ranks once this is true.
        left_out: why it can't be run here; empty if it can.
        num_lines: how many of its last lines the report shows when it is ok.
    """

    title: str
    command: list[str]
    limit: float
    status: int = 0
    check: Callable[[str], str] = lambda output: ""
    stop_when: Callable[[], bool] | None = None
    left_out: str = ""
    num_lines: int = 0


@dataclass(frozen=True)
class Outcome:
    """How a part ended.

    Attributes:
        ended: OK, FAILED, LEFT_OUT or RUNNING.
        remark: why so, or what was found.
        seconds: how long it took.
        last_lines: the end of its output.
    """

    title: str
    ended: str
    remark: str = ""
    seconds: float = 0.0
    last_lines: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        return f"{self.ended}: {self.remark}" if self.remark else self.ended


def run_parts(
    parts: list[Part], logs: Path, seconds: float, tell: Callable[[list[Outcome]], None]
) -> list[Outcome]:
    """Runs the parts in their order.

    Args:
        logs: the folder for their output, which is there.
        seconds: for all of them together; what has not begun by then has failed.
        tell: is given the outcomes so far before each part, the one that runs among them, and
            after it.
    """
    deadline = time.monotonic() + seconds
    outcomes: list[Outcome] = []
    for number, part in enumerate(parts, 1):
        left = deadline - time.monotonic()
        if part.left_out:
            outcome = Outcome(part.title, LEFT_OUT, part.left_out)
        elif left <= 0:
            outcome = Outcome(part.title, FAILED, f"no time left of {show_duration(seconds)}")
        else:
            part = replace(part, limit=min(part.limit, left))
            tell([*outcomes, Outcome(part.title, RUNNING, f"at most {show_duration(part.limit)}")])
            outcome = run_part(part, logs / f"{number:02d}.log")
        outcomes.append(outcome)
        tell(outcomes)
    return outcomes


def run_part(part: Part, log: Path) -> Outcome:
    """Runs a part to its end or to its limit; nothing that it has started is left."""
    start = time.monotonic()
    with open(log, "wb") as file:
        process = subprocess.Popen(
            part.command,
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env=_environment(),
        )
        try:
            _wait(process, part, start)
        finally:
            is_late = process.poll() is None
            _end(process)
    seconds = time.monotonic() - start
    output = log.read_text(errors="replace")
    ended, remark = _judge(process, part, is_late, output)
    lines = output.splitlines()
    shown = part.num_lines if ended == OK else max(part.num_lines, LINES_OF_A_FAILURE)
    return Outcome(part.title, ended, remark, seconds, tuple(lines[-shown:] if shown else ()))


def _environment() -> dict[str, str]:
    """With the programs beside this Python, such as ninja, in the path."""
    programs = str(Path(sys.executable).parent)
    return {**os.environ, "PATH": f"{programs}{os.pathsep}{os.environ.get('PATH', '')}"}


def _wait(process: subprocess.Popen, part: Part, start: float) -> None:
    """Waits for the end or the limit; sends SIGTERM to the ranks if that is the part's."""
    asked = False
    while process.poll() is None and time.monotonic() - start < part.limit:
        if part.stop_when is not None and not asked and part.stop_when():
            ranks = _ranks(process.pid)
            for rank in ranks:
                with suppress(psutil.Error):
                    rank.terminate()
            asked = bool(ranks)
        time.sleep(LOOK)


def _ranks(pid: int) -> list[psutil.Process]:
    """The training processes below a launcher; their data workers have their command line too."""
    found = {}
    for each in _descendants(pid):
        with suppress(psutil.Error):
            if any(word.startswith("--local_rank=") for word in each.cmdline()):
                found[each.pid] = (each, each.ppid())
    return [each for each, parent in found.values() if parent not in found]


def _descendants(pid: int) -> list[psutil.Process]:
    with suppress(psutil.Error):
        return psutil.Process(pid).children(recursive=True)
    return []


def _end(process: subprocess.Popen) -> None:
    """Ends what is left of a part, whatever session it is in."""
    started = _descendants(process.pid)
    with suppress(ProcessLookupError):  # nothing is left
        os.killpg(process.pid, signal.SIGTERM)
    for each in started:
        with suppress(psutil.Error):
            each.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(SECONDS_TO_END)
    _, alive = psutil.wait_procs(started, SECONDS_TO_END)
    for each in alive:
        with suppress(psutil.Error):
            each.kill()
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _judge(process: subprocess.Popen, part: Part, is_late: bool, output: str) -> tuple[str, str]:
    if is_late:
        return FAILED, f"it did not end in {show_duration(part.limit)}"
    if process.returncode != part.status:
        wanted = f", not {part.status}" if part.status else ""
        return FAILED, f"status {process.returncode}{wanted}"
    try:
        return OK, part.check(output)
    except CheckFailed as error:
        return FAILED, str(error)
    except Exception as error:  # whatever a check stumbles over, the parts after it are to run
        return FAILED, f"{type(error).__name__}: {error}"
