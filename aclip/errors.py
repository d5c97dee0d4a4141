"""The one error that a user's input can cause, and how a launch script reports it."""

import datetime
import os
import sys
import time
from collections.abc import Callable

EXIT_BAD_INPUT = 2
EXIT_UNREADABLE_DATA = 6
WAIT_FOR_RANKS = datetime.timedelta(seconds=10)


class ConfigError(ValueError):
    """Bad input. The message is one sentence that names the field, the value and what to do.

    Attributes:
        status: what a launch script exits with.
    """

    status = EXIT_BAD_INPUT


class DataError(ConfigError):
    """Data that can't be read while a run trains, which may have passed when it starts again."""

    status = EXIT_UNREADABLE_DATA


def run_reporting_errors(main: Callable[[], int | None]) -> None:
    """Runs `main` and exits with its status; a ConfigError becomes one line on stderr.

    `os._exit` ends the process at once after a ConfigError: data workers, collectives or a peer
    that has failed already must not keep a rank alive that has nothing left to do.
    """
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
        os._exit(error.status)
    sys.exit(status or 0)


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
            )
        deadline = time.monotonic() + WAIT_FOR_RANKS.total_seconds()
        store.add("ranks_in_error", 1)
        while store.add("ranks_in_error", 0) < num_ranks and time.monotonic() < deadline:
            time.sleep(0.05)
    except (OSError, RuntimeError, ValueError):
        pass  # The master is gone, so it has reported; this rank has too.
