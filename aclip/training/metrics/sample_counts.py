"""What a run has met among its samples: those that could not be used, and those with a note."""

from collections import Counter

from aclip.config.sections import CaptionKeys
from aclip.data.batch import Batch
from aclip.data.captions import note_kinds
from aclip.data.shards.listing import SKIP_KINDS


class SampleCounts:
    """Samples of all ranks by the kinds of SKIP_KINDS and note_kinds, and the repeated ones.

    Args:
        caption_keys: the recipe's, which have kinds of notes of their own.

    Attributes:
        repeated: samples that came once more in their epoch, in place of skipped ones.
    """

    def __init__(self, caption_keys: list[CaptionKeys]):
        self._kinds = (*SKIP_KINDS, *note_kinds(caption_keys))
        self._of_kind: Counter[str] = Counter()
        self.repeated = 0

    @property
    def skipped(self) -> dict[str, int]:
        return {kind: self._of_kind[kind] for kind in SKIP_KINDS if self._of_kind[kind]}

    @property
    def noted(self) -> dict[str, int]:
        return {kind: n for kind, n in self._of_kind.items() if n and kind not in SKIP_KINDS}

    def of_batch(self, batch: Batch) -> list[int]:
        """What a rank's batch holds, for `add` once it is added over the ranks."""
        counted = batch.skipped | batch.noted
        return [*(counted.get(kind, 0) for kind in self._kinds), batch.repeated]

    def add(self, counts: list[int]) -> list[int]:
        """Adds what `of_batch` gave; returns what stands behind it in the list."""
        end = len(self._kinds)
        self._of_kind.update(dict(zip(self._kinds, counts[:end], strict=True)))
        self.repeated += counts[end]
        return counts[end + 1 :]

    def state(self) -> dict:
        """What a checkpoint holds of them."""
        return {"skipped": dict(+self._of_kind), "repeated": self.repeated}

    def restore(self, state: dict) -> None:
        """Goes on from a checkpoint's state.json."""
        self._of_kind.update(state["skipped"])
        self.repeated = state["repeated"]
