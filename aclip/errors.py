"""The one error that a user's input can cause, and how a launch script reports it."""

import os
import sys
from collections.abc import Callable

EXIT_BAD_INPUT = 2


class ConfigError(ValueError):
    """Bad input. The message is one sentence that names the field, the value and what to do."""


def run_reporting_errors(main: Callable[[], int | None]) -> None:
    """Runs `main` and exits with its status; a ConfigError becomes one line on stderr and status 2.

    `os._exit` ends the process at once after a ConfigError: data workers, collectives or a peer
    that has failed already must not keep a rank alive that has nothing left to do.
    """
    try:
        status = main()
    except ConfigError as error:
        rank = os.environ.get("RANK")
        prefix = f"[rank {rank}] " if rank is not None else ""
        sys.stdout.flush()
        print(f"{prefix}error: {error}", file=sys.stderr, flush=True)
        os._exit(EXIT_BAD_INPUT)
    sys.exit(status or 0)
