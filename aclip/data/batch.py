"""Batches: made in parts by worker processes, joined in the main process in the lanes' order.

Global batch t is, for each lane in order, its next samples. Rank r owns consecutive lanes and each
of its workers a consecutive part of those, so the ranks' batches joined are the same for any number
of ranks and workers.
"""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from aclip.config import Recipe
from aclip.data.lanes import LaneStream, resolve_lanes, resolve_workers
from aclip.data.samples import Sample, SampleMaker
from aclip.data.shards import Shard, logger
from aclip.data.tokenizer import Tokenizer, build_tokenizer
from aclip.data.workers import end_when_told_by, run_ahead, signals_held, start_method
from aclip.errors import ConfigError


@dataclass(frozen=True)
class Batch:
    """B samples of one rank, V views each."""

    student_views: Tensor
    """(B, V, 3, R, R) uint8"""
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
    """(local lanes, 2) int64, (epoch, position) of each lane after this batch; stays on the CPU"""
    skipped: dict[str, int] = field(default_factory=dict)
    """Unusable samples met since the previous batch, by kind"""

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device | str) -> "Batch":
        """Moves what the step computes with; asynchronous from pinned memory."""
        tensors = {name: getattr(self, name) for name in PER_SAMPLE if name not in LISTS}
        return replace(
            self,
            **{
                name: None if tensor is None else tensor.to(device, non_blocking=True)
                for name, tensor in tensors.items()
            },
        )

    def split(self, size: int) -> list["Batch"]:
        """Micro-batches of `size` consecutive samples; each carries the whole batch's cursors."""
        values = {name: getattr(self, name) for name in PER_SAMPLE}
        return [
            replace(
                self,
                skipped=self.skipped if start == 0 else {},
                **{
                    name: None if value is None else value[start : start + size]
                    for name, value in values.items()
                },
            )
            for start in range(0, len(self), size)
        ]


LISTS = ("keys", "captions")
PER_SAMPLE = tuple(part.name for part in fields(Batch) if part.name not in ("cursors", "skipped"))


@dataclass(frozen=True)
class Part:
    """What a worker hands over: its part of a local batch, or the message of a ConfigError."""

    batch: Batch | None
    unusable_shards: list[str] = field(default_factory=list)
    error: str | None = None


def collate(
    samples: list[Sample], tokenizer: Tokenizer, cursors: np.ndarray, skipped: dict[str, int]
) -> Batch:
    """Stacks samples; `cursors` is (lanes, 2) int64."""

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
    return Batch(**joined, cursors=cursors, skipped=dict(skipped))


class LaneDataset(IterableDataset):
    """The parts of one rank's batches; in a worker process, that worker's parts. Never ends."""

    def __init__(
        self, recipe: Recipe, shards: list[Shard], num_lanes: int, first: int, cursors: np.ndarray
    ):
        self.recipe = recipe
        self.shards = shards
        self.num_lanes = num_lanes
        self.first = first
        self.cursors = cursors
        self.maker = SampleMaker(recipe, [shard.url for shard in shards])
        self.tokenizer = build_tokenizer(recipe.model.text.context_length)

    def __iter__(self) -> Iterator[Part]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        share = len(self.cursors) // workers
        streams = [self._stream(index) for index in range(worker * share, (worker + 1) * share)]
        per_lane = self.recipe.train.global_batch_size // self.num_lanes
        try:
            while True:
                samples = [sample for stream in streams for sample in stream.take(per_lane)]
                cursors = np.array([(s.epoch, s.position) for s in streams], dtype=np.int64)
                skipped = sum((stream.skipped for stream in streams), Counter())
                unusable = [url for stream in streams for url in stream.unusable_shards]
                for stream in streams:
                    stream.skipped.clear()
                    stream.unusable_shards.clear()
                yield Part(collate(samples, self.tokenizer, cursors, dict(skipped)), unusable)
        except ConfigError as error:
            # DataLoader would wrap the message in a traceback of the worker.
            yield Part(None, error=str(error))

    def _stream(self, index: int) -> LaneStream:
        lane = self.first + index
        return LaneStream(
            self.shards,
            lane,
            self.num_lanes,
            self.recipe.train.seed,
            self.recipe.data.shuffle_block,
            tuple(self.cursors[index].tolist()),
            partial(self.maker.make, lane),
        )


class TrainLoader:
    """Iterates over one rank's batches without end, each time from the cursors it was built with.

    Attributes:
        num_lanes: of all ranks.
        num_workers: of this rank; they live as long as the iteration.
    """

    def __init__(self, dataset: LaneDataset, num_workers: int, pin_memory: bool):
        self.num_lanes = dataset.num_lanes
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self._dataset = dataset

    def __iter__(self) -> Iterator[Batch]:
        loader = DataLoader(
            self._dataset,
            batch_size=None,
            num_workers=self.num_workers,
            multiprocessing_context=start_method() if self.num_workers else None,
            worker_init_fn=partial(end_when_told_by, os.getpid()),
            # Its own generator, because DataLoader draws a seed and would shift the global one.
            generator=torch.Generator(),
        )
        with signals_held():
            parts = iter(loader)
        batches = self._joined(parts)
        if self.pin_memory:
            batches = run_ahead(batches, torch.cuda.current_device())
        yield from batches

    def _joined(self, parts: Iterator[Part]) -> Iterator[Batch]:
        warned = set()
        while True:
            batches = []
            for _ in range(max(1, self.num_workers)):
                part = next(parts)
                if part.error is not None:
                    raise ConfigError(part.error)
                for url in set(part.unusable_shards) - warned:
                    logger.warning("shard %s holds no usable sample", url)
                    warned.add(url)
                batches.append(part.batch)
            yield join(batches, self.pin_memory)


def build_train_loader(
    recipe: Recipe,
    shards: list[Shard],
    rank: int,
    world_size: int,
    cursors: Tensor | None = None,
) -> TrainLoader:
    """Builds the stream of this rank's batches of global_batch_size / world_size samples.

    Args:
        recipe: with data.lanes and data.workers resolved here if they are empty.
        shards: of the whole data set, the same on every rank.
        rank, world_size: this process among all.
        cursors: (lanes of all ranks, 2) int64, (epoch, position) to continue from; None for the
            beginning.

    Raises:
        ConfigError: lanes, batch, ranks and workers do not fit, or the cursors belong to another
            number of lanes. While iterating: a shard can't be read or a lane holds nothing usable.
    """
    num_lanes = resolve_lanes(recipe.data.lanes, len(shards), recipe.train.global_batch_size)
    workers = resolve_workers(recipe.data.workers, num_lanes, world_size, _cores_per_rank())
    if cursors is None:
        cursors = torch.zeros(num_lanes, 2, dtype=torch.int64)
    if tuple(cursors.shape) != (num_lanes, 2):
        raise ConfigError(
            f"the checkpoint holds cursors of {len(cursors)} data lanes, but the recipe gives "
            f"{num_lanes}; set data.lanes to {len(cursors)}, or keep shards and batch as they were"
        )
    share = num_lanes // world_size
    local = cursors[rank * share : (rank + 1) * share].numpy()
    dataset = LaneDataset(recipe, shards, num_lanes, rank * share, local)
    return TrainLoader(dataset, workers, pin_memory=torch.cuda.is_available())


def _cores_per_rank() -> int:
    # torchrun and deepspeed tell how many ranks share the machine, each by its own name.
    ranks = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1"
    return len(os.sched_getaffinity(0)) // max(1, int(ranks))
