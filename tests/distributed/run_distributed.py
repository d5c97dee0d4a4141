"""Runs a function on several ranks of one machine, for tests: forked processes that talk over gloo.

Forking (not spawning) lets a rank run a function of a test module, which importlib mode cannot
import by name. Test modules get `run_distributed` as a fixture (conftest.py beside this file).
"""

import faulthandler
import gc
import multiprocessing
import os
import pickle
import signal
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import IO, Any

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  see below
import torch
import torch.distributed as dist

# DeepSpeed imports its optimizers, and with them torch's compiler, when an engine is built:
# imported here, that happens once and not in every forked rank.


class RankTraceback(Exception):
    """Carries a rank's traceback as text; the cause of the error that run_distributed raises."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def run_distributed(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0
) -> list[Any]:
    """Calls `fn(*args)` on `world_size` ranks and returns what each returned, in rank order.

    A rank sees an initialised torch.distributed (gloo), one torch thread, and RANK, LOCAL_RANK,
    WORLD_SIZE, MASTER_ADDR and MASTER_PORT in its environment. Its result must pickle; tensors do.

    Args:
        fn: what every rank runs; it may be a closure.
        world_size: number of ranks, 1 allowed.
        *args: passed to `fn` as they are.
        timeout: seconds for the whole run.

    Raises:
        The first failing rank's own exception, with that rank's traceback as its cause.
        RuntimeError: a rank ended without a result.
        TimeoutError: the run took longer than `timeout`; says where each rank stood.
        No process is left running in any of these cases.
    """
    context = multiprocessing.get_context("fork")
    processes, connections, stacks, stores = [], [], [], []
    # The parent listens before it forks, so no port is looked for first and lost to somebody else,
    # and serves only afterwards, so that no server thread holds a lock while a rank is forked.
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        try:
            for rank in range(world_size):
                receiver, sender = context.Pipe(duplex=False)
                stack = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed below, after the ranks
                rank_args = (fn, args, rank, world_size, port, sender, stack, 0.9 * timeout)
                process = context.Process(target=_run_rank, args=rank_args)
                process.start()
                sender.close()  # an ended rank then reads as end of file
                processes.append(process)
                connections.append(receiver)
                stacks.append(stack)
            stores.append(
                dist.TCPStore(
                    "127.0.0.1",
                    port,
                    is_master=True,
                    wait_for_workers=False,
                    master_listen_fd=os.dup(server.fileno()),
                )
            )
            return _collect(connections, processes, stacks, timeout)
        finally:
            for process in processes:
                _kill(process)
            stores.clear()  # a traceback may keep this frame, and with it the server's thread
            for file in (*connections, *stacks):
                file.close()


def _run_rank(
    fn: Callable[..., Any],
    args: tuple,
    rank: int,
    world_size: int,
    port: int,
    sender: Connection,
    stack: IO[str],
    stack_after: float,
) -> None:
    # Objects of the parent, whose threads do not exist here, must not be collected here.
    gc.freeze()
    os.setsid()  # one process group a rank, so that its data workers can be killed with it
    faulthandler.dump_traceback_later(stack_after, file=stack)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        GLOO_SOCKET_IFNAME="lo",
    )
    torch.set_num_threads(1)
    try:
        store = dist.TCPStore("127.0.0.1", port, is_master=False)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
        report = pickle.dumps((True, fn(*args)))
    # The rank's last frame: whatever stopped it, pytest's outcomes included, goes to the parent.
    except BaseException as error:
        report = _pickle_failure(error, f"rank {rank}:\n{traceback.format_exc()}")
    sender.send_bytes(report)
    if dist.is_initialized():
        dist.destroy_process_group()


def _pickle_failure(error: BaseException, text: str) -> bytes:
    try:
        report = pickle.dumps((False, (error, text)))
        pickle.loads(report)  # some exceptions pickle but do not come back
        return report
    except (pickle.PicklingError, TypeError, AttributeError, ValueError):
        return pickle.dumps((False, (RuntimeError(type(error).__name__), text)))


def _collect(
    connections: list[Connection], processes: list, stacks: list[IO[str]], timeout: float
) -> list[Any]:
    deadline = time.monotonic() + timeout
    results, pending = {}, dict(zip(connections, range(len(connections)), strict=True))
    while pending:
        ready = wait(list(pending), max(0.0, deadline - time.monotonic()))
        if not ready:
            late = sorted(pending.values())
            where = "\n".join(f"rank {rank} stood at:\n{_text(stacks[rank])}" for rank in late)
            raise TimeoutError(f"ranks {late} did not end in {timeout:g} s\n{where}")
        for connection in ready:
            rank = pending.pop(connection)
            try:
                succeeded, value = pickle.loads(connection.recv_bytes())
            except EOFError:
                processes[rank].join(5)
                code = processes[rank].exitcode
                raise RuntimeError(
                    f"rank {rank} ended without a result, exit code {code}"
                ) from None
            if not succeeded:
                error, text = value
                raise error from RankTraceback(text)
            results[rank] = value
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    return [results[rank] for rank in range(len(connections))]


def _text(file: IO[str]) -> str:
    file.seek(0)
    return file.read()


def _kill(process: multiprocessing.Process) -> None:
    """Ends a rank and the processes it started; a rank that ended properly is only joined."""
    if process.exitcode != 0:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:  # ended, or not yet the leader of its group
            process.kill()
    process.join()
