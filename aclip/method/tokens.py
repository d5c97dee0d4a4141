"""Captions as tokens: what a tokenizer gives, a text tower reads and a loss may mask.

Only `clip_tokens` knows how CLIP's vocabulary marks a caption's end.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

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
    """The captions of B images as ids, padded to L: R rows, one for each image or N.

    Attributes:
        ids: (R, L) int64; what stands behind a caption's end is 0.
        lengths: (R,) int64, how many ids are the caption's own, start and end included.
        real_ids: (T,) int64, where the captions' own ids stand: row * L + column, ascending. None
            until `located`.
        num_captions: (B,) int64, how many of an image's N consecutive rows are captions of it; the
            others, behind them, are empty captions that stand for none. None where N is 1.
    """

    ids: Tensor
    lengths: Tensor
    real_ids: Tensor | None = None
    num_captions: Tensor | None = None

    def __len__(self) -> int:
        """B."""
        return len(self.ids if self.num_captions is None else self.num_captions)

    def __getitem__(self, images: slice) -> "Tokens":
        """The captions of consecutive images."""
        if self.num_captions is None:
            return Tokens(self.ids[images], self.lengths[images])
        first, last, _ = images.indices(len(self))
        num_rows = len(self.ids) // len(self)
        rows = slice(first * num_rows, last * num_rows)
        return Tokens(self.ids[rows], self.lengths[rows], num_captions=self.num_captions[images])

    @property
    def ends(self) -> Tensor:
        """(R,) int64, the column of each caption's last id: there a causal tower has read all."""
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
        return replace(self, real_ids=is_real.flatten().nonzero().squeeze(1))

    def map(self, move: Callable[[Tensor], Tensor]) -> "Tokens":
        """The located captions with each tensor moved by `move`, such as a copy to a device."""
        located = self.located()
        values = {part.name: getattr(located, part.name) for part in fields(located)}
        return Tokens(**{n: None if v is None else move(v) for n, v in values.items()})


def clip_tokens(ids: Tensor) -> Tokens:
    """(B, L) int64 of CLIP's vocabulary, in which the end token has the greatest id; cut behind the
    longest caption, to a multiple of COLUMNS."""
    lengths = ids.argmax(1) + 1
    longest = int(lengths.max()) if len(lengths) else 0
    return Tokens(ids[:, : math.ceil(longest / COLUMNS) * COLUMNS], lengths)
