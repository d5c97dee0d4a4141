"""A validation set, split exactly over ranks: sample i belongs to rank i % world_size.

Every rank yields the same number of batches, because under ZeRO-3 a forward is a collective.
What happens to the batches is the suite's.
"""

import math
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from aclip.data.shards import Shard, Skip, read_captions, read_image_bytes, read_shard
from aclip.data.tar import RawSample
from aclip.data.views import center_crop, decode_image

DECODE_THREADS = 4
MIN_SIDE = 8
"""Images with a shorter side, pixels, are skipped: a long strip scaled up would fill memory."""
NO_LABEL = -1
MAX_LABEL_DIGITS = 9


@dataclass(frozen=True)
class ValidationBatch:
    """M samples of this rank, in front of rows of padding."""

    images: Tensor
    """(batch_size, 3, R, R) uint8; rows from M on are black padding."""
    indices: Tensor
    """(M,) int64 place of each sample in the whole set."""
    labels: Tensor
    """(M,) int64 class, or NO_LABEL."""
    captions: list[list[str]]
    """M lists, each maybe empty."""
    skipped: Counter
    """Samples of this batch that could not be used, by kind."""


def read_validation(
    shards: list[Shard], resolution: int, batch_size: int, rank: int, world_size: int
) -> Iterator[ValidationBatch]:
    """Yields this rank's samples in order, centre-cropped; batches are equally many on every rank.

    A sample that has no readable image, a label that is not a class number, or neither caption nor
    label is skipped and counted. The next batch is decoded while the caller works on this one.

    Args:
        shards: the set, in order.
        resolution: R, side of the square that is cut out, pixels.
        batch_size: rows of a batch; fewer if a rank has fewer samples.
        rank: of this process.
        world_size: number of ranks.
    """
    share = math.ceil(sum(shard.num_samples for shard in shards) / world_size)
    batch_size = min(batch_size, share)
    mine = _own_samples(shards, rank, world_size)
    with ThreadPoolExecutor(DECODE_THREADS) as pool:
        ahead = None
        for _ in range(math.ceil(share / batch_size)):
            chunk = islice(mine, batch_size)
            submitted = [(i, pool.submit(_load, sample, resolution)) for i, sample in chunk]
            if ahead is not None:
                yield _assemble(ahead, resolution, batch_size)
            ahead = submitted
        yield _assemble(ahead, resolution, batch_size)


def _own_samples(
    shards: list[Shard], rank: int, world_size: int
) -> Iterator[tuple[int, RawSample | Skip]]:
    first = 0
    for shard in shards:
        for position, sample in read_shard(shard):
            # What the index does not list would move every later sample to another rank.
            if position < shard.num_samples and (first + position) % world_size == rank:
                yield first + position, sample
        first += shard.num_samples


def _load(sample: RawSample | Skip, resolution: int) -> tuple[np.ndarray, int, list[str]] | Skip:
    if isinstance(sample, Skip):
        return sample
    encoded = read_image_bytes(sample)
    if isinstance(encoded, Skip):
        return encoded
    captions = read_captions(sample)
    has_captions = not isinstance(captions, Skip)
    label = NO_LABEL
    if "cls" in sample.members:
        text = sample.read("cls").strip()
        if not text.isdigit() or len(text) > MAX_LABEL_DIGITS:
            return Skip("bad_label")
        label = int(text)
    elif not has_captions:
        return captions
    image = decode_image(encoded, MIN_SIDE)
    if isinstance(image, Skip):
        return image
    return center_crop(image, resolution), label, captions if has_captions else []


def _assemble(
    loading: list[tuple[int, Future]], resolution: int, batch_size: int
) -> ValidationBatch:
    images = np.zeros((batch_size, 3, resolution, resolution), dtype=np.uint8)
    indices, labels, captions, skipped = [], [], [], Counter()
    for index, future in loading:
        loaded = future.result()
        if isinstance(loaded, Skip):
            skipped[loaded.kind] += 1
            continue
        images[len(indices)], label, texts = loaded
        indices.append(index)
        labels.append(label)
        captions.append(texts)
    return ValidationBatch(
        images=torch.from_numpy(images),
        indices=torch.tensor(indices, dtype=torch.int64),
        labels=torch.tensor(labels, dtype=torch.int64),
        captions=captions,
        skipped=skipped,
    )
