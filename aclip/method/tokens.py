"""Captions as tokens: what a tokenizer gives, a text tower reads and a loss may mask.

Only `clip_tokens` knows how CLIP's vocabulary marks a caption's end.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

VOCAB_SIZE = 49408
START_ID = 49406
END_ID = 49407
COLUMNS = 8
"""A batch of captions has a multiple of so many columns: on a GPU, attention plans anew for each
number of columns, which stalls the first step that has it."""


@dataclass(frozen=True)
class Tokens:
    """B captions as ids, padded to L.

    Attributes:
        ids: (B, L) int64; what stands behind a caption's end is 0.
        lengths: (B,) int64, how many ids are the caption's own, start and end included.
        real_ids: (T,) int64, where the captions' own ids stand: row * L + column, ascending. None
            until `located`.
    """

    ids: Tensor
    lengths: Tensor
    real_ids: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: slice) -> "Tokens":
        return Tokens(self.ids[rows], self.lengths[rows])

    @property
    def ends(self) -> Tensor:
        """(B,) int64, the column of each caption's last id: there a causal tower has read all."""
        return self.lengths - 1

    def located(self) -> "Tokens":
        """The same captions with `real_ids`.

        The number of real tokens is a shape, so on a GPU this waits for the device: call it while
        the tokens are on the CPU.
        """
        if self.real_ids is not None:
            return self
        columns = torch.arange(self.ids.shape[1], device=self.ids.device)
        is_real = columns < self.lengths.unsqueeze(1)
        return Tokens(self.ids, self.lengths, is_real.flatten().nonzero().squeeze(1))

    def map(self, move: Callable[[Tensor], Tensor]) -> "Tokens":
        """The located captions with each tensor moved by `move`, such as a copy to a device."""
        located = self.located()
        return Tokens(move(located.ids), move(located.lengths), move(located.real_ids))


def clip_tokens(ids: Tensor) -> Tokens:
    """(B, L) int64 of CLIP's vocabulary, in which the end token has the greatest id; cut behind the
    longest caption, to a multiple of COLUMNS."""
    lengths = ids.argmax(1) + 1
    longest = int(lengths.max()) if len(lengths) else 0
    return Tokens(ids[:, : math.ceil(longest / COLUMNS) * COLUMNS], lengths)
