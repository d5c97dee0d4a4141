"""What a long evaluation says in between."""

import time

from aclip.distributed import say

SECONDS = 5


class SpokenProgress:
    """Prints what a set's evaluation has done, every few seconds and at the end of each part.

    Args:
        name: what the set is called.
        seconds: at least so many lie between two lines.
        ends: whether the end of a part is said in any case.
    """

    def __init__(self, name: str, seconds: float = SECONDS, ends: bool = True):
        self._name, self._seconds, self._ends = name, seconds, ends
        self._next = time.monotonic() + seconds

    def __call__(self, words: str, done: int, total: int) -> None:
        now = time.monotonic()
        if now < self._next and (done < total or not self._ends):
            return
        self._next = now + self._seconds
        share = f": {done:,} of {total:,} on this rank" if total > 1 else ""
        say(f"{self._name}, {words}{share}")
