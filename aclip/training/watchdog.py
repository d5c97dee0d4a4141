"""Ends a run that makes no progress, on every rank, and says which process stands where.

Each rank reports its phase and step; a thread beside it compares the time since then with the limit
and answers the other ranks' roll call over the rendezvous store. Whoever is late first calls the
roll, names the stalled ranks and ends; the others follow. Nothing here waits for the main thread
or for a collective, nor for the store without a limit.
"""

import faulthandler
import json
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch.distributed as dist

from aclip.cli import EXIT_HANG, print_stacks_on_signal

SLOW_FACTOR = 6
"""Start, first step, evaluation and checkpoint may take so many times longer than a step."""
STARTING = "starting up"
LOADING = "loading data"
COMPUTING = "computing"
EVALUATING = "evaluating"
SAVING = "saving a checkpoint"
SLOW_PHASES = (STARTING, EVALUATING, SAVING)
ROLL_CALL, CALLERS = "watchdog/roll_call", "watchdog/callers"
MOST_SECONDS_BETWEEN_LOOKS = 2.0
SECONDS_TO_ANSWER = 5.0
SECONDS_TO_WRITE = 10.0
"""Seconds after which a process ends although its log could not be written."""
SECONDS_TO_CLOSE = 3 * SECONDS_TO_ANSWER + SECONDS_TO_WRITE
SECONDS_FOR_STACKS = 0.5
OTHERS_UNKNOWN = "the others are named by another rank, or the rendezvous store on rank 0 is silent"
GRACE = 2 * SECONDS_TO_ANSWER
"""Seconds after the limit until a process whose Python can't run is ended from C; by then another
rank has said that it does not answer."""


@dataclass(frozen=True)
class Standing:
    """Where a rank stands.

    Attributes:
        rank: its number among all ranks.
        host, pid: where its process runs.
        step: optimizer step, from 1; 0 before the first.
        phase: what it does, see enter().
        seconds: seconds since it entered the phase.
        in_collective: whether a thread waits in torch.distributed.
        answered: whether it answered the roll call; otherwise this is what it had published before.
    """

    rank: int
    host: str
    pid: int
    step: int
    phase: str
    seconds: float
    in_collective: bool = False
    answered: bool = False

    def __str__(self) -> str:
        where = f"rank {self.rank} (host {self.host}, process {self.pid})"
        doing = "waiting in a collective while " if self.in_collective else ""
        text = f"{where}: step {self.step}, {doing}{self.phase} for {self.seconds:.0f} s"
        return text if self.answered else f"{text} when last heard of; it does not answer"


class Watchdog:
    """Watches this rank's progress; see the module.

    Args:
        hang_timeout: seconds that a step may take, and the loading of its batch.
    """

    def __init__(self, hang_timeout: float):
        self._timeout = hang_timeout
        self._between_looks = min(MOST_SECONDS_BETWEEN_LOOKS, hang_timeout / 10)
        self._rank = int(os.environ.get("RANK", 0))
        self._host = socket.gethostname()
        self._stopped = threading.Event()
        self._called = threading.Event()
        self._batches = 0
        self._store: dist.TCPStore | None = None
        # One tuple, so that the threads read a consistent state: phase, step, since, limit.
        self._state = (STARTING, 0, time.monotonic(), self.slow_limit)

    @property
    def slow_limit(self) -> float:
        """Seconds that the slow phases may take."""
        return SLOW_FACTOR * self._timeout

    def enter(self, phase: str, step: int) -> None:
        """Reports progress: this rank begins `phase` of `step`."""
        # The first step behind a start may compile, also that of a run's later stage.
        self._batches = 0 if phase == STARTING else self._batches + (phase == LOADING)
        slow = phase in SLOW_PHASES or self._batches < 2
        limit = self.slow_limit if slow else self._timeout
        self._state = (phase, step, time.monotonic(), limit)

    def start(self) -> None:
        """Begins to watch; SIGUSR2 prints the process's stacks from now on."""
        print_stacks_on_signal()
        self.enter(STARTING, 0)
        # When the launcher ends, its ranks must end too: nobody else would end them.
        launched = "LOCAL_SIZE" in os.environ or "LOCAL_WORLD_SIZE" in os.environ
        self._launcher = os.getppid() if launched else None
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def connect(self) -> None:
        """Joins the other ranks' watchdogs; after the process group is made."""
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            threading.Thread(target=self._answer, name="watchdog-store", daemon=True).start()

    def stop(self) -> None:
        self._stopped.set()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self._stopped.wait(self._between_looks):
            _, _, since, limit = self._state
            late = time.monotonic() - since - limit
            if self._launcher is not None and os.getppid() != self._launcher:
                self._end(f"the launcher of {self._me()} is gone")
            if self._called.is_set():
                self._end(f"another rank has called a hang; {self._me()}")
            # From C, for a process whose Python can't run: then this thread can't run either.
            seconds = GRACE - late if late <= 0 else GRACE + SECONDS_TO_CLOSE
            faulthandler.dump_traceback_later(seconds, exit=True, file=2)
            if late > 0:
                self._end(self._verdict(limit))
        faulthandler.cancel_dump_traceback_later()  # it may have been set again after stop()

    def _me(self, answered: bool = True) -> Standing:
        phase, step, since, _ = self._state
        return Standing(
            rank=self._rank,
            host=self._host,
            pid=os.getpid(),
            step=step,
            phase=phase,
            seconds=time.monotonic() - since,
            in_collective=_waits_in_collective(),
            answered=answered,
        )

    def _answer(self) -> None:
        """Publishes where this rank stands, and answers when the roll is called."""
        try:
            store = _open_store()
            while not self._stopped.wait(self._between_looks):
                store.set(_key(self._rank), json.dumps(asdict(self._me(answered=False))))
                if store.check([ROLL_CALL]):
                    store.set(_key(self._rank), json.dumps(asdict(self._me())))
                    # The one who called reads the answer before this rank's end closes the store.
                    self._stopped.wait(SECONDS_TO_ANSWER)
                    self._called.set()
                    return
        except (RuntimeError, OSError):
            return  # Rank 0 is gone and the store with it; every rank still has its own limit.

    def _verdict(self, limit: float) -> str:
        """Calls the roll and says who stalls."""
        text = f"no progress for {limit:g} s (train.hang_timeout is {self._timeout:g})"
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            return f"{text}; {self._me()}"
        standings: list[Standing] = []
        # In a thread of its own, since a store behind a dead link may never answer.
        call = threading.Thread(target=self._call_roll, args=(standings,), daemon=True)
        call.start()
        call.join(2 * SECONDS_TO_ANSWER)
        if not standings:
            return f"{text}; {self._me()}; {OTHERS_UNKNOWN}"
        stalled = stalled_ranks(standings)
        others = [one for one in standings if one not in stalled]
        lines = [f"{text}; stalled: {'; '.join(map(str, stalled))}"]
        return "\n".join([*lines, *(f"  beside it {one}" for one in others)])

    def _call_roll(self, standings: list[Standing]) -> None:
        try:
            store = _open_store()
            ranks = range(int(os.environ["WORLD_SIZE"]))
            store.set(_key(self._rank), json.dumps(asdict(self._me())))
            store.set(ROLL_CALL, str(self._rank))
            if store.add(CALLERS, 1) > 1:
                # The first rank speaks for all; if this one ended now, it would interrupt that one.
                time.sleep(SECONDS_TO_ANSWER)
                return
            deadline = time.monotonic() + SECONDS_TO_ANSWER - self._between_looks
            while True:
                found = [_read(store, rank) for rank in ranks]
                if all(one.answered for one in found) or time.monotonic() > deadline:
                    break
                time.sleep(0.1)
            standings += found
        except (RuntimeError, OSError):
            return

    def _end(self, reason: str) -> None:
        """Writes the reason and the stacks of this process and its workers, and ends them."""
        if self._stopped.is_set():
            return
        exit_anyway = threading.Timer(SECONDS_TO_WRITE, os._exit, [EXIT_HANG])
        exit_anyway.daemon = True
        exit_anyway.start()
        workers = multiprocessing.active_children()
        try:
            sys.stdout.flush()
            os.write(2, f"[rank {self._rank}] error: {reason}\nits stacks:\n".encode())
            faulthandler.dump_traceback(file=2, all_threads=True)
            for worker in workers:
                os.write(2, f"[rank {self._rank}] data worker, process {worker.pid}:\n".encode())
                os.kill(worker.pid, signal.SIGUSR2)
                os.kill(worker.pid, signal.SIGCONT)  # a stopped one writes its stacks too
                time.sleep(SECONDS_FOR_STACKS)
        except OSError:
            pass  # The log's reader is gone, or a worker; this process still has to end.
        for worker in workers:
            worker.kill()
        os._exit(EXIT_HANG)


def stalled_ranks(standings: list[Standing]) -> list[Standing]:
    """Who holds the others up: ranks that don't answer, else those that are furthest behind.

    Ranks run in lock-step, so whoever is in an earlier step or phase keeps the others waiting; of
    several in the same place, those that do not wait in a collective themselves.
    """
    silent = [one for one in standings if not one.answered]
    if silent:
        return silent
    order = (STARTING, LOADING, COMPUTING, EVALUATING, SAVING)
    last = min((one.step, order.index(one.phase)) for one in standings)
    behind = [one for one in standings if (one.step, order.index(one.phase)) == last]
    return [one for one in behind if not one.in_collective] or behind


def _waits_in_collective() -> bool:
    own = os.path.dirname(dist.__file__)
    for frame in sys._current_frames().values():
        while frame is not None:
            if frame.f_code.co_filename.startswith(own):
                return True
            frame = frame.f_back
    return False


def _key(rank: int) -> str:
    return f"watchdog/{rank}"


def _read(store: dist.TCPStore, rank: int) -> Standing:
    if not store.check([_key(rank)]):
        return Standing(rank, "unknown", 0, 0, STARTING, 0.0)
    return Standing(**json.loads(store.get(_key(rank))))


def _open_store() -> dist.TCPStore:
    """A connection of its own: the process group's may be held by a waiting main thread."""
    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=timedelta(seconds=SECONDS_TO_ANSWER),
    )
