"""A rank that stalls, in whatever way, ends every rank within the limit, named in the log.

Ranks are forked here by hand: run_distributed ends all of them as soon as one has ended.
"""

import ctypes
import multiprocessing
import os
import re
import signal
import socket
import threading
import time

import pytest
import torch
import torch.distributed as dist
from processes import still_running

from aclip.cli import EXIT_HANG
from aclip.training.watchdog import (
    COMPUTING,
    LOADING,
    SAVING,
    STARTING,
    Standing,
    Watchdog,
    stalled_ranks,
)

pytestmark = pytest.mark.distributed

LIMIT = 1.0
STALL_STEP = 4
MOST_SECONDS = 25.0
FORK = multiprocessing.get_context("fork")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _rank(rank, port, folder, stall):
    """Steps with an all-reduce each; rank 1 stalls before the one of STALL_STEP."""
    log = os.open(folder / f"rank-{rank}.log", os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 2)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    os.environ.update(GLOO_SOCKET_IFNAME="lo", LOCAL_SIZE="2")
    torch.set_num_threads(1)
    watchdog = Watchdog(LIMIT)
    watchdog.start()
    dist.init_process_group("gloo")
    watchdog.connect()
    for step in range(1, STALL_STEP + 2):
        watchdog.enter(LOADING, step)
        time.sleep(0.3)
        watchdog.enter(COMPUTING, step)
        if rank == 1 and step == STALL_STEP:
            stall(watchdog, step)
        dist.all_reduce(torch.ones(1))
    watchdog.stop()


def _run(folder, stall, ending=(0, 1)):
    """Exit statuses and logs of two ranks, after those that are to end."""
    port, start = _free_port(), time.monotonic()
    ranks = [FORK.Process(target=_rank, args=(rank, port, folder, stall)) for rank in range(2)]
    for process in ranks:
        process.start()
    for rank in ending:
        ranks[rank].join(max(0.1, start + MOST_SECONDS - time.monotonic()))
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
        process.join()
    return codes, [(folder / f"rank-{rank}.log").read_text() for rank in range(2)]


def stands_in_python(watchdog, step):
    time.sleep(60)


def reads_for_ever(watchdog, step):
    watchdog.enter(LOADING, step + 1)
    worker = FORK.Process(target=waits_for_a_disk)
    worker.start()
    worker.join()


def waits_for_a_disk():
    time.sleep(60)


def keeps_the_interpreter(watchdog, step):
    ctypes.PyDLL(None).sleep(60)


def stops(watchdog, step):
    os.kill(os.getpid(), signal.SIGSTOP)


def test_rank_that_stands_still_is_named_with_step_and_stack(tmp_path):
    codes, logs = _run(tmp_path, stands_in_python)
    assert all(codes), codes
    both = "".join(logs)
    assert re.search(rf"stalled: rank 1 \(host .*\): step {STALL_STEP}, computing", both)
    assert "stalled: rank 0" not in both
    assert "stands_in_python" in logs[1], "the stack of the stalled rank"


def test_data_worker_that_stands_still_is_ended_with_its_stack(tmp_path):
    codes, logs = _run(tmp_path, reads_for_ever)
    assert all(codes), codes
    assert "data worker, process" in logs[1]
    assert "waits_for_a_disk" in logs[1]
    worker = int(re.search(r"data worker, process (\d+)", logs[1])[1])
    assert not still_running([worker], MOST_SECONDS)


def test_rank_that_keeps_the_interpreter_is_ended_from_c_with_its_stack(tmp_path):
    codes, logs = _run(tmp_path, keeps_the_interpreter)
    assert all(codes), codes
    assert re.search(rf"stalled: rank 1 .* step {STALL_STEP}, .*does not answer", logs[0])
    assert "keeps_the_interpreter" in logs[1]


def test_stopped_process_is_named_by_the_others(tmp_path):
    codes, logs = _run(tmp_path, stops, ending=[0])
    assert codes == [EXIT_HANG, None], "only a launcher can end a stopped process"
    assert re.search(rf"stalled: rank 1 .* step {STALL_STEP}, .*does not answer", logs[0])


def _in_one_process(function):
    process = FORK.Process(target=function)
    process.start()
    process.join(MOST_SECONDS)
    code = process.exitcode
    process.kill()
    return code


def test_start_first_step_and_checkpoint_may_take_longer():
    def slow_but_fine():
        watchdog = Watchdog(0.5)
        watchdog.start()
        time.sleep(1.2)
        for step, seconds in ((1, 1.2), (2, 0.1)):
            watchdog.enter(LOADING, step)
            time.sleep(seconds)
            watchdog.enter(COMPUTING, step)
            time.sleep(seconds)
        watchdog.enter(SAVING, 2)
        time.sleep(1.2)
        watchdog.enter(STARTING, 2)  # the next stage, whose first step may compile
        watchdog.enter(LOADING, 3)
        watchdog.enter(COMPUTING, 3)
        time.sleep(1.2)
        watchdog.stop()
        time.sleep(1.2)

    assert _in_one_process(slow_but_fine) == 0


def test_checkpoint_that_never_ends_is_a_hang_too():
    def saves_for_ever():
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        watchdog = Watchdog(0.2)
        watchdog.start()
        watchdog.enter(SAVING, 7)
        time.sleep(60)

    assert _in_one_process(saves_for_ever) == EXIT_HANG


def test_rank_ends_when_its_launcher_is_gone(tmp_path):
    pids = FORK.Queue()

    def rank():
        os.dup2(os.open(tmp_path / "log", os.O_CREAT | os.O_WRONLY), 2)
        os.environ["LOCAL_SIZE"] = "1"
        watchdog = Watchdog(100.0)
        watchdog.start()
        pids.put(os.getpid())
        threading.Event().wait(60)

    def launcher():
        FORK.Process(target=rank).start()
        time.sleep(60)

    process = FORK.Process(target=launcher)
    process.start()
    pid = pids.get(timeout=MOST_SECONDS)
    process.kill()
    process.join()
    assert not still_running([pid], MOST_SECONDS)
    assert "the launcher of rank" in (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    "places, stalled",
    [
        pytest.param([(5, COMPUTING, True), (5, COMPUTING, False)], [1], id="out of a collective"),
        pytest.param([(6, COMPUTING, False), (5, COMPUTING, True)], [1], id="a step behind"),
        pytest.param([(5, COMPUTING, True), (5, LOADING, False)], [1], id="no batch yet"),
        pytest.param([(5, COMPUTING, True), (5, COMPUTING, True)], [0, 1], id="the network"),
        pytest.param([(5, SAVING, False), (5, SAVING, True)], [0], id="the writer of a checkpoint"),
    ],
)
def test_who_holds_the_others_up(places, stalled):
    standings = [
        Standing(rank, "host", 1, step, phase, 10.0, waits, answered=True)
        for rank, (step, phase, waits) in enumerate(places)
    ]
    assert [one.rank for one in stalled_ranks(standings)] == stalled
