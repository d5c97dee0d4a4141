"""What the ranks of an evaluation do as one: they fail together, and count together."""

from collections import Counter

from aclip import distributed
from aclip.errors import ConfigError, DataError


def raise_together(error: ConfigError | None) -> None:
    """Raises the error of the first rank that has one, on every rank; a collective.

    A rank that failed alone would leave the others waiting for it in their next collective.
    """
    # Not the error itself: not every class of them can be pickled.
    words = None if error is None else (str(error), isinstance(error, DataError))
    for found in distributed.gather_objects(words):
        if found is not None:
            text, is_data_error = found
            raise DataError(text) if is_data_error else ConfigError(text)


def count_together(counts: Counter) -> Counter:
    """The sum of all ranks' counts; a collective."""
    return sum(distributed.gather_objects(counts), Counter())
