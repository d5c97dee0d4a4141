"""The processes that write shards, and the bar that shows how far they are."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from aclip.data.convert.images import FileReader, ImageRule
from aclip.data.convert.plan import ConversionPlan
from aclip.data.convert.shard_writer import ShardRecord, write_shard
from aclip.data.progress import progress_bar
from aclip.errors import ConfigError

SECONDS_BETWEEN_LOOKS = 0.5
TASKS_A_PROCESS = 2
"""Shards that are handed out ahead."""


@dataclass(frozen=True, slots=True)
class ShardTask:
    """A shard to write: entries `first` to `last` - 1 of the plan."""

    number: int
    path: Path
    first: int
    last: int


def write_shards(
    tasks: list[ShardTask],
    plan_file: Path,
    images: Path,
    rule: ImageRule,
    processes: int,
    done: int,
) -> Iterator[ShardRecord]:
    """Yields the record of each shard as it is finished, in any order.

    Args:
        tasks: the shards.
        plan_file: the conversion's plan.
        images: the folder of the source's images.
        rule: what is kept of an image.
        processes: how many write at once.
        done: how many entries are in shards that were finished before, for the bar.

    Raises:
        ConfigError: a shard can't be written, a file of the source can't be read, or a process was
            killed.
    """
    if not tasks:
        return
    context = multiprocessing.get_context("fork")  # other ways import the launch script again
    counter = context.Value("Q", 0)
    pool = ProcessPoolExecutor(
        min(processes, len(tasks)), context, _start_worker, (plan_file, images, rule, counter)
    )
    waiting = iter(tasks)
    running = {pool.submit(_write, task) for task in islice(waiting, TASKS_A_PROCESS * processes)}
    total = done + sum(task.last - task.first for task in tasks)
    try:
        with progress_bar(total=total, initial=done, desc="writing", unit=" entries") as bar:
            while running:
                finished, running = wait(running, SECONDS_BETWEEN_LOOKS, FIRST_COMPLETED)
                bar.update(done + counter.value - bar.n)
                for future in finished:
                    yield future.result()
                    running |= {pool.submit(_write, task) for task in islice(waiting, 1)}
    except BrokenProcessPool:
        raise ConfigError(
            "a process that writes shards was killed, by the kernel perhaps for want of memory; "
            "run the same command again to continue, with a smaller --processes"
        ) from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


class _Worker:
    """What a process keeps between its shards."""

    def __init__(self, plan_file: Path, images: Path, rule: ImageRule, counter):
        self.plan = ConversionPlan(plan_file)
        self.reader = FileReader(images)
        self.rule = rule
        self.counter = counter

    def write(self, task: ShardTask) -> ShardRecord:
        entries = self.plan.read(task.first, task.last)
        return write_shard(task.path, task.number, entries, self.reader, self.rule, self._count)

    def _count(self) -> None:
        with self.counter.get_lock():
            self.counter.value += 1


_worker: _Worker | None = None


def _start_worker(*arguments) -> None:
    global _worker
    end_with_parent()
    _worker = _Worker(*arguments)


def end_with_parent() -> None:
    """Ctrl-C is for the main process; this one ends when that is gone, however it went."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _write(task: ShardTask) -> ShardRecord:
    return _worker.write(task)
