"""What a run has met among its samples: those that could not be used, and those with a note."""

from collections import Counter

from aclip.data.batch import Batch
from aclip.data.captions import NOTE_KINDS
from aclip.data.shards.listing import SKIP_KINDS

KINDS = (*SKIP_KINDS, *NOTE_KINDS)


class SampleCounts:
    """Samples of all ranks by the kinds of SKIP_KINDS and NOTE_KINDS, and the repeated ones.

    Attributes:
        repeated: samples that came once more in their epoch, in place of skipped ones.
    """

    def __init__(self):
        self._of_kind: Counter[str] = Counter()
        self.repeated = 0

    @property
    def skipped(self) -> dict[str, int]:
        return {kind: self._of_kind[kind] for kind in SKIP_KINDS if self._of_kind[kind]}

    @property
    def noted(self) -> dict[str, int]:
        return {kind: self._of_kind[kind] for kind in NOTE_KINDS if self._of_kind[kind]}

    def of_batch(self, batch: Batch) -> list[int]:
        """What a rank's batch holds, for `add` once it is added over the ranks."""
        counted = batch.skipped | batch.noted
        return [*(counted.get(kind, 0) for kind in KINDS), batch.repeated]

    def add(self, counts: list[int]) -> list[int]:
        """Adds what `of_batch` gave; returns what stands behind it in the list."""
        *of_kinds, repeated = counts[: len(KINDS) + 1]
        self._of_kind.update(dict(zip(KINDS, of_kinds, strict=True)))
        self.repeated += repeated
        return counts[len(KINDS) + 1 :]

    def state(self) -> dict:
        """What a checkpoint holds of them."""
        return {"skipped": dict(+self._of_kind), "repeated": self.repeated}

    def restore(self, state: dict) -> None:
        """Goes on from a checkpoint's state.json."""
        self._of_kind.update(state["skipped"])
        self.repeated = state["repeated"]
