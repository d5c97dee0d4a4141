"""How far long work on data is: a bar on a terminal, and a line now and then in a log."""

import sys

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10
# The bar's thread must not run when the workers are forked.
tqdm.monitor_interval = 0


class _LogLines:
    """Takes what a bar writes and prints it as lines."""

    def write(self, text: str) -> None:
        line = text.strip()
        if line:
            sys.stderr.write(f"{line}\n")

    def flush(self) -> None:
        sys.stderr.flush()


def progress_bar(*arguments, **options) -> tqdm:
    """A bar of tqdm's, with its arguments; where standard error is no terminal, nothing for ten
    seconds, and then a line every ten."""
    if sys.stderr.isatty():
        return tqdm(*arguments, **options)
    form = "{desc}: {n_fmt} of {total_fmt}{unit}, {rate_fmt}, {elapsed} passed, {remaining} left"
    if options.get("total") is None:
        form = "{desc}: {n_fmt}{unit}, {rate_fmt}, {elapsed} passed"
    every = SECONDS_BETWEEN_LINES
    log = {"file": _LogLines(), "mininterval": every, "delay": every, "bar_format": form}
    return tqdm(*arguments, **options, **log, miniters=1)
