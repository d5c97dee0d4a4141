"""An evaluation set, split exactly over ranks: sample i belongs to rank i % world_size.

Every rank yields the same number of batches, because under ZeRO-3 a forward is a collective.
What happens to the batches is evaluate_set.py's.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from aclip.data.images.decode import decode_image
from aclip.data.images.views import center_crop
from aclip.data.members import read_captions, read_image_bytes
from aclip.data.shards.listing import Shard, Skip, read_shard
from aclip.data.shards.tar import RawSample
from aclip.errors import ConfigError, DataError

DECODE_THREADS = 4
MIN_SIDE = 8
"""Images with a shorter side, pixels, are skipped: a long strip scaled up would fill memory."""
NO_LABEL = -1
BAD_LABEL = "bad_label"
"""The kind of a .cls that holds no class number."""
MAX_LABEL_DIGITS = 9


@dataclass(frozen=True, slots=True)
class Example:
    """One usable sample: an RGB image of any size, its class or NO_LABEL, and maybe captions."""

    image: Image.Image
    label: int
    captions: list[str]
    notes: frozenset[str] = frozenset()
    """What is counted about the captions, kinds of NOTE_KINDS."""


class EvaluationSet(Protocol):
    """Where samples come from.

    Attributes:
        name: what messages call the set.
        num_samples: the number of all samples, also of those that can't be used.
        notes: sentences about what was found, for reports.
    """

    name: str
    num_samples: int
    notes: list[str]

    def read(self, rank: int, world_size: int) -> Iterator[tuple[int, Callable]]:
        """This rank's samples in order: the place in the set, and what loads the sample there.

        The function returns an Example or a Skip. It may run in another thread.
        """


@dataclass(frozen=True)
class ValidationBatch:
    """M of this rank's samples, followed by rows of padding."""

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
    noted: Counter
    """Samples of this batch whose captions' text was guessed or left out in part, by kind."""
    error: DataError | None = None
    """Why this rank can't read on; the set can't be scored then."""


class ShardSet:
    """A set in WebDataset shards.

    A sample that has no readable image, a label that is not a class number, or neither caption nor
    label is skipped.

    Args:
        shards: the shards in their order.
    """

    def __init__(self, shards: list[Shard]):
        self.name = f"{shards[0].url} ..."
        self.num_samples = sum(shard.num_samples for shard in shards)
        self.notes: list[str] = []
        self._shards = shards

    def read(self, rank: int, world_size: int) -> Iterator[tuple[int, Callable]]:
        first = 0
        for shard in self._shards:
            for position, sample in read_shard(shard):
                # What the index does not list would move every later sample to another rank.
                if position < shard.num_samples and (first + position) % world_size == rank:
                    yield first + position, lambda sample=sample: self._load(sample)
            first += shard.num_samples

    def _load(self, sample: RawSample | Skip) -> Example | Skip:
        if isinstance(sample, Skip):
            return sample
        encoded = read_image_bytes(sample)
        if isinstance(encoded, Skip):
            return encoded
        captions = read_captions(sample)
        has_captions = not isinstance(captions, Skip)
        label = read_label(sample)
        if isinstance(label, Skip):
            return label
        if label == NO_LABEL and not has_captions:
            return captions
        image = decode_image(encoded, MIN_SIDE)
        if isinstance(image, Skip):
            return image
        if not has_captions:
            return Example(image, label, [])
        return Example(image, label, captions, captions.notes)


def read_label(sample: RawSample) -> int | Skip:
    """The class number of a sample, or NO_LABEL where there is no .cls."""
    if "cls" not in sample.members:
        return NO_LABEL
    text = sample.read("cls").strip()
    if not text.isdigit() or len(text) > MAX_LABEL_DIGITS:
        return Skip(BAD_LABEL)
    return int(text)


def read_validation(
    dataset: EvaluationSet,
    resolution: int,
    batch_size: int,
    rank: int,
    world_size: int,
    resample: Image.Resampling = Image.Resampling.BILINEAR,
) -> Iterator[ValidationBatch]:
    """Yields this rank's samples in order, centre-cropped; batches are equally many on every rank.

    What can't be used is counted. The next batch is decoded while the caller works on this one.
    Where reading fails, the batches stay equally many, empty from there on, and hold the error: the
    caller, who works together with other ranks, raises it when they meet.

    Args:
        dataset: a set of at least one sample.
        resolution: R, side of the square that is cut out, pixels.
        batch_size: most rows of a batch.
        rank: this process's rank.
        world_size: number of ranks.
        resample: how images are scaled.
    """
    share = math.ceil(dataset.num_samples / world_size)
    num_batches = math.ceil(share / batch_size)
    batch_size = math.ceil(share / num_batches)  # as little padding as that many batches allow
    mine = dataset.read(rank, world_size)

    def load(loader: Callable) -> tuple[np.ndarray, int, list[str], frozenset[str]] | Skip:
        example = loader()
        if isinstance(example, Skip):
            return example
        pixels = center_crop(example.image, resolution, resample)
        return pixels, example.label, example.captions, example.notes

    error: DataError | None = None
    with ThreadPoolExecutor(DECODE_THREADS) as pool:

        def submit() -> list[tuple[int, Future]]:
            nonlocal error
            try:
                chunk = [] if error else list(islice(mine, batch_size))
            except ConfigError as failure:  # a shard, or its server
                chunk, error = [], DataError(str(failure))
            return [(index, pool.submit(load, loader)) for index, loader in chunk]

        def assemble(loading: list[tuple[int, Future]]) -> ValidationBatch:
            nonlocal error
            try:
                batch = _assemble(loading, resolution, batch_size)
            except DataError as failure:  # what holds the images
                batch, error = _assemble([], resolution, batch_size), failure
            return replace(batch, error=error)

        ahead = submit()
        for number in range(1, num_batches + 1):
            loading, ahead = ahead, submit() if number < num_batches else []
            yield assemble(loading)


def _assemble(
    loading: list[tuple[int, Future]], resolution: int, batch_size: int
) -> ValidationBatch:
    images = np.zeros((batch_size, 3, resolution, resolution), dtype=np.uint8)
    indices, labels, captions = [], [], []
    skipped, noted = Counter(), Counter()
    for index, future in loading:
        loaded = future.result()
        if isinstance(loaded, Skip):
            skipped[loaded.kind] += 1
            continue
        images[len(indices)], label, texts, notes = loaded
        indices.append(index)
        labels.append(label)
        captions.append(texts)
        noted.update(notes)
    return ValidationBatch(
        images=torch.from_numpy(images),
        indices=torch.tensor(indices, dtype=torch.int64),
        labels=torch.tensor(labels, dtype=torch.int64),
        captions=captions,
        skipped=skipped,
        noted=noted,
    )
