"""A batch: what one step of one rank reads, stacked, joined and split."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from aclip.data.images.whole_images import PixelBuffer, WholeImages, join_images, stack_images
from aclip.data.samples import Sample
from aclip.data.tokenizer import Tokenizer
from aclip.method.tokens import Tokens


@dataclass(frozen=True)
class Batch:
    """B samples of one rank, V views each."""

    student_views: Tensor | None
    """(B, V, 3, R, R) uint8; like the other views None where `whole_images` holds the images"""
    teacher_view: Tensor | None
    """(B, 3, T, T) uint8"""
    student_boxes: Tensor
    """(B, V, 4) int32, (top, left, height, width) in pixels of the decoded image"""
    teacher_box: Tensor | None
    """(B, 4) int32, contains the student boxes"""
    augment_params: Tensor
    """(B, V, 9) fp32, see aclip.kernels.augment_views"""
    mask_noise: Tensor | None
    """(B, V, G / block_size, G / block_size) fp32 in [0, 1), for a mask that reads noise"""
    ssl_views: Tensor | None
    """(B, S, 3, R, R) uint8, S views of their own for a loss between views"""
    ssl_params: Tensor | None
    """(B, S, 9) fp32, as augment_params"""
    tokens: Tokens
    """The tokens of each sample's captions, of what is kept of them"""
    term_noise: dict[str, Tensor]
    """(B, ...) fp32 in [0, 1), what each loss term wants, by the term's name"""
    keys: list[str]
    captions: list[str]
    """Each sample's first caption"""
    cursors: Tensor
    """(local lanes, 3) int64, each lane's LaneStream.cursor after this batch; with N sources
    (local lanes, 1 + 3 N), see MixedLane.cursor. Stays on the CPU"""
    skipped: dict[str, int] = field(default_factory=dict)
    """Unusable samples met since the previous batch, by kind"""
    repeated: int = 0
    """Number of this batch's samples that stand in for unusable ones, see LaneStream"""
    noted: dict[str, int] = field(default_factory=dict)
    """Samples of this batch about whose captions something is counted, by kind of
    captions.note_kinds"""
    whole_images: WholeImages | None = None
    """Whole images, from which the views are still to be cut"""
    to_teach: list[str] = field(default_factory=list)
    """Why the teacher scores each sample in this step, a kind of TO_TEACH; empty where it does not.
    Zeros stand for the teacher view of a sample that it does not score beside others"""
    stored_scores: Tensor | None = None
    """(B, S, S) uint8, see score_codes.py: scores that the teacher gave in an earlier epoch; zeros
    for a sample that lacks them, None where none are read"""
    score_place: Tensor | None = None
    """(B,) int64, the sample's number in the data set, at which its new scores are kept; -1 where
    they are not. Stays on the CPU"""

    def __len__(self) -> int:
        return len(self.keys)

    def map_pixels(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """The batch with its views, or with its whole images, changed by `change`."""

        def changed(value: Tensor | WholeImages | None) -> Tensor | WholeImages | None:
            if isinstance(value, WholeImages):
                return value.map(change)
            return None if value is None else change(value)

        return replace(self, **{name: changed(getattr(self, name)) for name in PIXELS})

    def split(self, size: int) -> list["Batch"]:
        """Micro-batches of `size` consecutive samples; each carries the whole batch's cursors."""
        return [
            replace(
                self,
                skipped=self.skipped if start == 0 else {},
                repeated=self.repeated if start == 0 else 0,
                noted=self.noted if start == 0 else {},
                **{
                    name: _rows(getattr(self, name), slice(start, start + size))
                    for name in PER_SAMPLE
                },
            )
            for start in range(0, len(self), size)
        ]


PIXELS = ("student_views", "teacher_view", "ssl_views", "whole_images")
OF_ALL = ("cursors", "skipped", "repeated", "noted")
PER_SAMPLE = tuple(part.name for part in fields(Batch) if part.name not in OF_ALL)
NOT_STACKED = (
    "key",
    "caption",
    "others",
    "token_ids",
    "term_noise",
    "whole_image",
    "notes",
    "to_teach",
)
"""Fields of Sample that `collate` treats one by one; all others are stacked."""
STACKED = tuple(part.name for part in fields(Sample) if part.name not in NOT_STACKED)
MAY_BE_ZEROS = ("teacher_view", "stored_scores")
"""What some samples of a batch may have and others not, for which zeros stand."""


def collate(
    samples: list[Sample],
    tokenizer: Tokenizer,
    cursors: np.ndarray,
    skipped: dict[str, int],
    buffer: PixelBuffer | None = None,
    repeated: int = 0,
) -> Batch:
    """Stacks samples; `cursors`, `skipped` and `repeated` become Batch's, and the samples' images
    were decoded into `buffer`."""

    def stack(arrays: list[np.ndarray | None], may_be_zeros: bool = False) -> Tensor | None:
        found = next((array for array in arrays if array is not None), None)
        if found is None:
            return None
        if may_be_zeros:
            blank = np.zeros_like(found)
            arrays = [blank if array is None else array for array in arrays]
        return torch.from_numpy(np.stack(arrays))

    return Batch(
        **{
            name: stack([getattr(sample, name) for sample in samples], name in MAY_BE_ZEROS)
            for name in STACKED
        },
        term_noise={
            name: stack([sample.term_noise[name] for sample in samples])
            for name in samples[0].term_noise
        },
        tokens=_encode(samples, tokenizer),
        keys=[sample.key for sample in samples],
        captions=[sample.caption for sample in samples],
        cursors=torch.from_numpy(cursors),
        skipped=skipped,
        repeated=repeated,
        noted=dict(Counter(kind for sample in samples for kind in sample.notes)),
        whole_images=stack_images([sample.whole_image for sample in samples], buffer),
        to_teach=[sample.to_teach for sample in samples],
    )


def _encode(samples: list[Sample], tokenizer: Tokenizer) -> Tokens:
    """The tokens of all captions; an empty caption stands where a sample lacks one."""
    if samples[0].token_ids is None:
        texts = [text or "" for sample in samples for text in (sample.caption, *sample.others)]
        tokens = tokenizer.encode(texts)
    else:
        tokens = tokenizer.stack([ids for sample in samples for ids in sample.token_ids])
    if not samples[0].others:
        return tokens
    counts = [1 + sum(text is not None for text in sample.others) for sample in samples]
    return replace(tokens, num_captions=torch.tensor(counts))


def join(parts: list[Batch], pin: bool = False) -> Batch:
    """Joins consecutive parts of a batch, with one copy, into pinned memory if asked."""
    if len(parts) == 1 and not pin:
        return parts[0]
    parts = _with_zeros(parts)
    return Batch(
        **{name: _join([getattr(part, name) for part in parts], pin) for name in PER_SAMPLE},
        cursors=torch.cat([part.cursors for part in parts]),
        skipped=dict(sum((Counter(part.skipped) for part in parts), Counter())),
        repeated=sum(part.repeated for part in parts),
        noted=dict(sum((Counter(part.noted) for part in parts), Counter())),
    )


def _with_zeros(parts: list[Batch]) -> list[Batch]:
    """The parts, each with what one of them has of MAY_BE_ZEROS."""
    for name in MAY_BE_ZEROS:
        values = [getattr(part, name) for part in parts]
        found = next((value for value in values if value is not None), None)
        if found is not None:
            parts = [
                replace(part, **{name: found.new_zeros(len(part), *found.shape[1:])})
                if value is None
                else part
                for part, value in zip(parts, values, strict=True)
            ]
    return parts


def _rows(value, rows: slice):
    if isinstance(value, dict):
        return {name: _rows(item, rows) for name, item in value.items()}
    return None if value is None else value[rows]


def _join(values: list, pin: bool):
    """Joins one field of consecutive parts."""
    first = values[0]
    if first is None:
        return None
    if isinstance(first, list):
        return [item for value in values for item in value]
    if isinstance(first, dict):
        return {name: _join([value[name] for value in values], pin) for name in first}
    if isinstance(first, WholeImages):
        return join_images(values, pin)
    if isinstance(first, Tokens):
        longest = max(value.ids.shape[1] for value in values)
        ids = [F.pad(value.ids, (0, longest - value.ids.shape[1])) for value in values]
        return Tokens(
            _join(ids, pin),
            _join([value.lengths for value in values], pin),
            num_captions=_join([value.num_captions for value in values], pin),
        )
    shape = (sum(len(value) for value in values), *first.shape[1:])
    return torch.cat(values, out=torch.empty(shape, dtype=first.dtype, pin_memory=pin))
