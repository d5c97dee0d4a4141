"""How the launch scripts speak: --help, tables, one line about an error, the exit status, stacks
on a signal."""

import argparse
import datetime
import faulthandler
import io
import os
import signal
import sys
import time
from collections.abc import Callable, Collection, Sequence
from itertools import zip_longest

from aclip.errors import ConfigError, DataError, NotWritten, PortInUse
from aclip.files import expand_home

EXIT_FAILED_RUNS = 1
"""Some of an ablation's runs, or of an evaluation's sets, have failed; or the ranks' port is in
use, for which another start can help."""
EXIT_BAD_INPUT = 2
"""Also a node that is not fit for a run. Nothing restarts after this status or the next one."""
EXIT_NON_FINITE = 3
"""The loss or a gradient is not finite."""
EXIT_HANG = 4
"""The watchdog has ended a run that made no progress."""
EXIT_NOT_SAVED = 5
"""A checkpoint, or another file that was asked for, could not be written."""
EXIT_UNREADABLE_DATA = 6
"""A shard stays unreadable; it may be readable again later."""
EXIT_INTERRUPTED = 130
"""Ctrl-C ended a conversion: what a shell gives for SIGINT."""
EXIT_STOPPED_BY_SIGNAL = 143
"""SIGTERM, after a checkpoint: what a shell gives for a process that this signal ended."""
MIB, GIB = 2**20, 2**30
WAIT_FOR_RANKS = datetime.timedelta(seconds=10)


class DefaultsShown(argparse.ArgumentDefaultsHelpFormatter):
    """Shows each default but empty ones, whose help says what happens then."""

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.default in (None, False, []):
            return action.help
        return super()._get_help_string(action)


def path(text: str) -> str:
    """The `type` of an option that takes a path: `~` in front stands for the home folder, also
    where no shell has replaced it, as in --output=~/run."""
    try:
        return expand_home(text, "this")
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def text_table(rows: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> str:
    """Rows of cells as aligned lines, with two spaces between the columns.

    Args:
        rows: the header comes first, if there is one; a row may end early.
        left: the columns that are aligned on the left; the others are aligned on the right.
    """
    widths = [max(map(len, column)) for column in zip_longest(*rows, fillvalue="")]
    lines = []
    for row in rows:
        cells = (
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=False))
        )
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def show_duration(seconds: float) -> str:
    """`45 s`, `3 min 05 s`, `2 h 07 min` or `3 d 04 h`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    if seconds < 86400:
        return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
    return f"{seconds // 86400} d {seconds % 86400 // 3600:02d} h"


def run_reporting_errors(main: Callable[[], int | None]) -> None:
    """Runs `main` and exits with its status; a ConfigError becomes one line on stderr.

    `os._exit` ends the process at once after a ConfigError: data workers, collectives or a peer
    that has failed already must not keep a rank alive that has nothing left to do.
    """
    print_any_name()
    try:
        status = main()
    except ConfigError as error:
        rank = os.environ.get("RANK")
        prefix = f"[rank {rank}] " if rank is not None else ""
        sys.stdout.flush()
        # One write with its line end, or the ranks' lines run into each other.
        sys.stderr.write(f"{prefix}error: {error}\n")
        sys.stderr.flush()
        _let_other_ranks_report()
        os._exit(_status(error))
    sys.exit(status or 0)


def print_any_name() -> None:
    """From now on a file's name whose bytes are no text is printed with escapes, where Python by
    itself would end with a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _status(error: ConfigError) -> int:
    if isinstance(error, NotWritten):
        return EXIT_NOT_SAVED
    if isinstance(error, PortInUse):
        return EXIT_FAILED_RUNS
    return EXIT_UNREADABLE_DATA if isinstance(error, DataError) else EXIT_BAD_INPUT


def _let_other_ranks_report() -> None:
    """Waits until every rank came here, or for a few seconds.

    The launcher ends all ranks as soon as one has ended, so without this the slower ones would
    go without their word.
    """
    num_ranks = int(os.environ.get("WORLD_SIZE", 1))
    if num_ranks == 1:
        return
    import torch.distributed as dist

    try:
        if dist.is_initialized():
            store = dist.distributed_c10d._get_default_store()
        else:
            store = dist.TCPStore(
                os.environ["MASTER_ADDR"],
                int(os.environ["MASTER_PORT"]),
                is_master=os.environ["RANK"] == "0",
                timeout=WAIT_FOR_RANKS,
                wait_for_workers=False,
                multi_tenant=True,  # this process may serve the ranks already
            )
        deadline = time.monotonic() + WAIT_FOR_RANKS.total_seconds()
        store.add("ranks_in_error", 1)
        while store.add("ranks_in_error", 0) < num_ranks and time.monotonic() < deadline:
            time.sleep(0.05)
    except (OSError, RuntimeError, ValueError):
        pass  # The first rank is gone, so it has reported, and so has this one.


def print_stacks_on_signal() -> None:
    """From now on SIGUSR2 prints this process's stacks, also while it runs C code."""
    faulthandler.register(signal.SIGUSR2, file=2, all_threads=True)
