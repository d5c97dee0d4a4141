"""Trains the runs of an ablation, one process per free device, and goes on where it was.

Several ablations, on other machines too, share the runs of one folder: who claims a run trains it.
"""

import ctypes
import os
import shutil
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from aclip.ablation.runs import CLAIM_FILE, LOG_FILE, Run
from aclip.cli import EXIT_NON_FINITE
from aclip.files import make_folder, writing
from aclip.lock import PATIENCE, InUse, claim, release
from aclip.nodes.agent import PR_SET_PDEATHSIG
from aclip.run_folder.layout import CHECKPOINTS_FOLDER, SCORES_FOLDER

LOOK = 0.2
"""Seconds between two looks at the processes."""
LOOK_ELSEWHERE = 5.0
"""Seconds between two looks at runs that other ablations train."""


class Runner:
    """Starts runs on devices as these become free.

    Args:
        command: starts pretrain.py with the arguments that all runs share.
        devices: environment variables that give a process its device, one dict a device.
        report: called whenever a run has finished.
        keeps_checkpoints: whether finished runs keep their last checkpoint.
    """

    def __init__(
        self,
        command: list[str],
        devices: list[dict[str, str]],
        report: Callable[[], None],
        keeps_checkpoints: bool = False,
    ):
        self._command, self._report = command, report
        self._keeps_checkpoints = keeps_checkpoints
        self._free = list(devices)
        self._running: dict[subprocess.Popen, tuple[Run, dict, float]] = {}
        self._told: set[subprocess.Popen] = set()
        self._seconds: list[float] = []
        self._num_devices = len(devices)
        self._is_stopping = False
        self._next_look = 0.0
        self._elsewhere: set[Path] = set()
        self._notes: set[str] = set()
        self._libc = ctypes.CDLL(None)  # not in the child, where loading could wait for a lock

    def run(self, runs: list[Run]) -> tuple[list[Run], bool]:
        """Returns when all runs are finished, here or by another ablation, or have failed here.

        Returns:
            The runs that failed, and whether a signal stopped the rest.
        """
        waiting = deque(run for run in runs if not run.is_finished)
        print(
            f"{len(runs)} runs, {len(runs) - len(waiting)} of them finished before; "
            f"{self._num_devices} at a time; each writes its lines to {LOG_FILE} in its folder",
            flush=True,
        )
        failed = []
        previous = {n: signal.signal(n, self._stop) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            while self._running or (waiting and not self._is_stopping):
                if not self._is_stopping:
                    self._start_free(waiting)
                time.sleep(LOOK)
                if self._is_stopping:
                    self._end_runs()
                failed += self._collect(len(waiting))
        finally:
            self._end_runs()
            for process in self._running:
                process.wait()
            for number, handler in previous.items():
                signal.signal(number, handler)
        return failed, self._is_stopping

    def _start_free(self, waiting: deque[Run]) -> None:
        """Starts runs that nobody else trains on the free devices."""
        if not self._free or time.monotonic() < self._next_look:
            return
        for _ in range(len(waiting)):
            run = waiting.popleft()
            if self._claims(run):
                self._start(run)
            elif not run.is_finished:
                waiting.append(run)
            if not self._free:
                return
        self._next_look = time.monotonic() + LOOK_ELSEWHERE

    def _claims(self, run: Run) -> bool:
        """Whether the run is this ablation's to train: nobody else has or had it."""
        make_folder(run.folder)
        try:
            note = claim(run.folder, "--output", "an ablation", name=CLAIM_FILE)
        except InUse as error:
            if run.folder not in self._elsewhere:
                self._elsewhere.add(run.folder)
                print(f"{run.folder.name} is trained by {error.owner}", flush=True)
            return False
        if note is not None and not self._notes:
            self._notes.add(note)
            print(note, flush=True)
        run.check()
        if run.is_finished:
            release(run.folder, CLAIM_FILE)
        return not run.is_finished

    def _start(self, run: Run) -> None:
        run.note(finished=False)
        device = self._free.pop(0)
        command = [*self._command, "--output", str(run.folder), *run.case.overrides]
        with writing(run.folder / LOG_FILE):
            log = open(run.folder / LOG_FILE, "ab")  # noqa: SIM115 - closed below
        with log:
            process = subprocess.Popen(
                [*command, f"train.seed={run.seed}"],
                env=os.environ | PATIENCE | device,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C comes to this process, which passes it on once
                preexec_fn=self._stop_with_parent,
            )
        self._running[process] = (run, device, time.monotonic())

    def _collect(self, num_waiting: int) -> list[Run]:
        """Notes the runs that have ended; returns those that failed."""
        failed = []
        for process in [process for process in self._running if process.poll() is not None]:
            run, device, start = self._running.pop(process)
            self._free.append(device)
            diverged = process.returncode == EXIT_NON_FINITE and run.may_diverge
            if process.returncode == 0 or diverged:
                run.note(finished=True, diverged=diverged)
                self._clean(run)
                self._seconds.append(time.monotonic() - start)
                self._report()
                print(f"{run.folder.name} is finished; {self._rest(num_waiting)}", flush=True)
            elif not self._is_stopping:
                failed.append(run)
                print(
                    f"{run.folder.name} ended with status {process.returncode}: "
                    f"{_last_line(run.folder / LOG_FILE)}",
                    flush=True,
                )
            release(run.folder, CLAIM_FILE)
        return failed

    def _clean(self, run: Run) -> None:
        """Leaves small files of a finished run, unless its checkpoint is to be kept."""
        names = [SCORES_FOLDER] if self._keeps_checkpoints else [SCORES_FOLDER, CHECKPOINTS_FOLDER]
        for name in names:
            shutil.rmtree(run.folder / name, ignore_errors=True)

    def _rest(self, num_waiting: int) -> str:
        mean = sum(self._seconds) / len(self._seconds)
        # A run on the way counts as half done.
        minutes = mean * (num_waiting + len(self._running) / 2) / self._num_devices / 60
        return f"{num_waiting + len(self._running)} to go, about {minutes:.0f} minutes"

    def _stop(self, number: int, frame) -> None:
        self._is_stopping = True

    def _stop_with_parent(self) -> None:
        """Asks the kernel for SIGTERM at the parent's death, so that no run stays behind it."""
        self._libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)

    def _end_runs(self) -> None:
        """Each saves a checkpoint and ends; the same command continues."""
        running = self._running.keys() - self._told
        if running:
            print(f"stopping: {len(running)} runs save a checkpoint and end", flush=True)
        for process in running:
            process.terminate()
        self._told |= running


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n")
    return next((line for line in reversed(lines) if line.strip()), "no output")
