"""A batch: what one step of one rank reads, stacked, joined and split."""

from collections import Counter
from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from aclip.data.samples import Sample
from aclip.data.tokenizer import Tokenizer
from aclip.data.whole_images import PixelBuffer, WholeImages, join_images, stack_images


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
    """(B, V, G / block_size, G / block_size) fp32 in [0, 1), for mask.policy random"""
    ssl_views: Tensor | None
    """(B, S, 3, R, R) uint8, S views for SimCLR alone"""
    ssl_params: Tensor | None
    """(B, S, 9) fp32, as augment_params"""
    distill_noise: Tensor | None
    """(B, 1, G, G) fp32 in [0, 1): the patches that masked self-distillation hides"""
    mlm_noise: Tensor | None
    """(B, context_length) fp32 in [0, 1): the tokens that masked language modelling hides"""
    tokens: Tensor
    """(B, L) int64, L the longest caption's length"""
    keys: list[str]
    captions: list[str]
    cursors: Tensor
    """(local lanes, 2) int64, (epoch, position) of each lane after this batch; with S sources
    (local lanes, 1 + 2 S), see MixedLane.cursor. Stays on the CPU"""
    skipped: dict[str, int] = field(default_factory=dict)
    """Unusable samples met since the previous batch, by kind"""
    whole_images: WholeImages | None = None
    """Whole images, from which the views are still to be cut"""

    def __len__(self) -> int:
        return len(self.keys)

    def split(self, size: int) -> list["Batch"]:
        """Micro-batches of `size` consecutive samples; each carries the whole batch's cursors."""
        values = {name: getattr(self, name) for name in PER_SAMPLE}
        return [
            replace(
                self,
                skipped=self.skipped if start == 0 else {},
                whole_images=None
                if self.whole_images is None
                else self.whole_images[start : start + size],
                **{
                    name: None if value is None else value[start : start + size]
                    for name, value in values.items()
                },
            )
            for start in range(0, len(self), size)
        ]


LISTS = ("keys", "captions")
OF_ALL = ("cursors", "skipped", "whole_images")
PER_SAMPLE = tuple(part.name for part in fields(Batch) if part.name not in OF_ALL)


def collate(
    samples: list[Sample],
    tokenizer: Tokenizer,
    cursors: np.ndarray,
    skipped: dict[str, int],
    buffer: PixelBuffer | None = None,
) -> Batch:
    """Stacks samples; `cursors` as Batch.cursors, `buffer` what their images were decoded into."""

    def stack(arrays: list[np.ndarray | None]) -> Tensor | None:
        return None if arrays[0] is None else torch.from_numpy(np.stack(arrays))

    captions = [sample.caption for sample in samples]
    return Batch(
        student_views=stack([sample.views.student_views for sample in samples]),
        teacher_view=stack([sample.views.teacher_view for sample in samples]),
        student_boxes=stack([sample.views.student_boxes for sample in samples]),
        teacher_box=stack([sample.views.teacher_box for sample in samples]),
        augment_params=stack([sample.augment_params for sample in samples]),
        mask_noise=stack([sample.mask_noise for sample in samples]),
        ssl_views=stack([sample.ssl_views for sample in samples]),
        ssl_params=stack([sample.ssl_params for sample in samples]),
        distill_noise=stack([sample.distill_noise for sample in samples]),
        mlm_noise=stack([sample.mlm_noise for sample in samples]),
        tokens=tokenizer.encode(captions),
        keys=[sample.key for sample in samples],
        captions=captions,
        cursors=torch.from_numpy(cursors),
        skipped=skipped,
        whole_images=stack_images([sample.whole_image for sample in samples], buffer),
    )


def join(parts: list[Batch], pin: bool = False) -> Batch:
    """Joins consecutive parts of a batch, with one copy, into pinned memory if asked."""
    if len(parts) == 1 and not pin:
        return parts[0]
    length = max(part.tokens.shape[1] for part in parts)
    parts = [
        replace(part, tokens=F.pad(part.tokens, (0, length - part.tokens.shape[1])))
        for part in parts
    ]
    joined = {}
    for name in PER_SAMPLE:
        values = [getattr(part, name) for part in parts]
        if name in LISTS:
            joined[name] = [item for value in values for item in value]
        elif values[0] is not None:
            shape = (sum(len(value) for value in values), *values[0].shape[1:])
            whole = torch.empty(shape, dtype=values[0].dtype, pin_memory=pin)
            joined[name] = torch.cat(values, out=whole)
        else:
            joined[name] = None
    cursors = torch.cat([part.cursors for part in parts])
    skipped = sum((Counter(part.skipped) for part in parts), Counter())
    whole_images = join_images([part.whole_images for part in parts], pin)
    return Batch(**joined, cursors=cursors, skipped=dict(skipped), whole_images=whole_images)
