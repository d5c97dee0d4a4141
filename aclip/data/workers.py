"""Worker processes and threads beside a training process: how they start, and how they end."""

import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import Any, Protocol

import torch

from aclip.cli import print_stacks_on_signal

HANDLED_BY_MAIN = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
SECONDS_BETWEEN_LOOKS = 2.0
"""How long a worker may outlive a main process that was killed."""
ITEMS_AHEAD = 2
"""Number of batches that lie ready in memory before the step asks for them."""


def start_method() -> multiprocessing.context.BaseContext:
    """How workers start: fork, or forkserver once CUDA runs here, which a fork can't inherit."""
    if not torch.cuda.is_initialized():
        return multiprocessing.get_context("fork")
    context = multiprocessing.get_context("forkserver")
    # Started now, because its start unblocks SIGTERM, which signals_held must keep blocked.
    resource_tracker.ensure_running()
    context.set_forkserver_preload(["__main__", "aclip.data.loader", "open_clip"])
    return context


@contextmanager
def signals_held():
    """Processes started inside never see the signals that the main process handles.

    They inherit the signal mask, also through the forkserver. The signals are blocked rather than
    ignored, so that a signal for the main process that comes meanwhile is not lost.
    """
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED_BY_MAIN)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def end_when_told_by(main_process: int, worker: int) -> None:
    """Ends this worker at SIGTERM from the main process, and when the main process is gone.

    A main process stops its children with SIGTERM at exit. SIGTERM from elsewhere, such as a
    launcher that sends it to the whole process tree, is for the main process, which may need the
    worker's batches until it has saved a checkpoint. DataLoader can't notice that the main process
    is gone, because it watches the forkserver, which lives as long as its workers.
    """

    def wait() -> None:
        main = multiprocessing.parent_process()
        while main.is_alive():
            received = signal.sigtimedwait({signal.SIGTERM}, SECONDS_BETWEEN_LOOKS)
            if received is not None and received.si_pid == main_process:
                break
        os._exit(0)

    print_stacks_on_signal()
    threading.Thread(target=wait, daemon=True).start()


class Sender(Protocol):
    """Brings an item to a device, see SideStream."""

    device: torch.device

    def send(self, item: Any) -> tuple: ...

    def receive(self, *sent: Any) -> Any: ...


def run_ahead(items: Iterator[Any], sender: Sender | None = None) -> Iterator[Any]:
    """Runs an iterator in a thread, so that the copy into pinned memory overlaps the step.

    With a sender the thread also sends the next item, one at a time, so that the device never holds
    more than that one beside the item in use.
    """
    ready: queue.SimpleQueue = queue.SimpleQueue()
    room = threading.Semaphore(ITEMS_AHEAD if sender is None else 1)
    stop = threading.Event()

    def run() -> None:
        if sender is not None:
            torch.cuda.set_device(sender.device)
        try:
            for item in items:
                while not room.acquire(timeout=0.5):
                    if stop.is_set():
                        return
                ready.put(((item,) if sender is None else sender.send(item), None))
                if stop.is_set():
                    return
        except BaseException as error:  # handed over, and raised in the main thread
            ready.put((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            room.release()
            yield item[0] if sender is None else sender.receive(*item)
    finally:
        stop.set()
        thread.join()
