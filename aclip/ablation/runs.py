"""Trains every case with every seed, one process per free device, and goes on where it was."""

import ctypes
import json
import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from aclip.ablation.cases import Case
from aclip.errors import ConfigError
from aclip.files import write_whole, writing
from aclip.lock import PATIENCE
from aclip.nodes.agent import PR_SET_PDEATHSIG

STATE_FILE, LOG_FILE = "ablation.json", "log.txt"
LOOK = 0.2
"""Seconds between two looks at the processes."""


@dataclass(frozen=True)
class Run:
    """A case with a seed.

    Attributes:
        folder: its run folder.
        settings: all that its result depends on.
    """

    case: Case
    seed: int
    folder: Path
    settings: dict

    @property
    def is_finished(self) -> bool:
        return self._state().get("finished", False)

    def check(self) -> None:
        """Raises ConfigError if the folder holds anything else than a run with these settings."""
        if not self.folder.is_dir():
            return
        if self._state().get("settings") != self.settings:
            raise ConfigError(
                f"--output holds {self.folder}, which was trained with other settings; give "
                "another --output, or the settings that it was started with"
            )

    def note(self, finished: bool) -> None:
        state = {"settings": self.settings, "finished": finished}
        write_whole(self.folder / STATE_FILE, json.dumps(state, indent=1).encode())

    def _state(self) -> dict:
        path = self.folder / STATE_FILE
        try:
            return dict(json.loads(path.read_text())) if path.is_file() else {}
        except (ValueError, TypeError):
            raise ConfigError(f"{path} is damaged; remove {self.folder}") from None


def make_runs(
    cases: list[Case], seeds: int, output: Path, ds_values: dict, data: dict
) -> list[Run]:
    """Every case with seed 0, then with seed 1, and so on: a stopped ablation has equally many
    seeds of every row.

    Args:
        seeds: their number; they are 0, ..., seeds - 1.
        ds_values: the ds_config's content.
        data: what identifies the shards.
    """
    return [
        Run(
            case,
            seed,
            output / f"{case.name}-seed{seed}",
            {"recipe": _with_seed(case, seed), "ds_config": ds_values, "data": data},
        )
        for seed in range(seeds)
        for case in cases
    ]


class Runner:
    """Starts runs on devices as these become free.

    Args:
        command: starts pretrain.py with the arguments that all runs share.
        devices: environment variables that give a process its device, one dict a device.
        report: called whenever a run has finished.
    """

    def __init__(
        self, command: list[str], devices: list[dict[str, str]], report: Callable[[], None]
    ):
        self._command, self._report = command, report
        self._free = list(devices)
        self._running: dict[subprocess.Popen, tuple[Run, dict, float]] = {}
        self._told: set[subprocess.Popen] = set()
        self._seconds: list[float] = []
        self._num_devices = len(devices)
        self._is_stopping = False
        self._libc = ctypes.CDLL(None)  # not in the child, where loading could wait for a lock

    def run(self, runs: list[Run]) -> tuple[list[Run], bool]:
        """Returns the runs that failed, and whether a signal stopped the rest."""
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
                while waiting and self._free and not self._is_stopping:
                    self._start(waiting.popleft())
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
            if process.returncode == 0:
                run.note(finished=True)
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
        return failed

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


def _with_seed(case: Case, seed: int) -> dict:
    values = case.recipe.model_dump(mode="json")
    values["train"]["seed"] = seed
    return values


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n")
    return next((line for line in reversed(lines) if line.strip()), "no output")
