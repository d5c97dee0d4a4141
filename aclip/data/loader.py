"""The stream of batches: parts from worker processes, joined in the main process in lane order.

A global batch joins the next samples of all lanes, in the lanes' order. Each rank owns consecutive
lanes, and each of its workers a consecutive part of those. So the ranks' batches together are the
same for any number of ranks and workers.
"""

import itertools
import logging
import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from aclip.config.geometry import patch_grid
from aclip.config.recipe import Recipe
from aclip.data.batch import Batch, collate, join
from aclip.data.dealing import count_lanes, deal
from aclip.data.images.whole_images import PixelBuffer
from aclip.data.lanes.counts import resolve_workers
from aclip.data.lanes.mixing import MixedLane, Turns
from aclip.data.lanes.order import LaneOrder, SourceOrder
from aclip.data.lanes.stream import LaneStream
from aclip.data.reduce import build_text
from aclip.data.samples import SampleMaker
from aclip.data.shards.listing import Shard
from aclip.data.shards.tar import ShardError
from aclip.data.side_stream import SideStream
from aclip.data.stored_scores import ScoreFiles, ScoreReader
from aclip.data.workers import (
    end_when_told_by,
    run_ahead,
    signals_held,
    start_method,
)
from aclip.errors import ConfigError, DataError, NotWritten
from aclip.machine import ranks_of_machine, usable_cores

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Part:
    """What a worker hands over: its part of a local batch, or the message of a ConfigError."""

    batch: Batch | None
    warnings: list[str] = field(default_factory=list)
    error: str | None = None
    seconds: float = 0.0
    """Wall time that the worker took to make it"""
    error_type: type[ConfigError] = ConfigError
    """Decides the exit status: DataError for a shard that can't be read, NotWritten for a cache
    folder that can't be written."""


class LaneDataset(IterableDataset):
    """Endless parts of one rank's batches; in a worker process, only that worker's parts."""

    def __init__(
        self,
        recipe: Recipe,
        shards: list[Shard],
        num_lanes: int,
        first: int,
        cursors: np.ndarray,
        steps_done: int = 0,
        scores: ScoreFiles | None = None,
    ):
        self.recipe = recipe
        self.shards = shards
        self.num_lanes = num_lanes
        self.first = first
        self.cursors = cursors
        self.steps_done = steps_done
        self.scores = scores
        patch_grid(recipe)  # refuses a tower here rather than in a worker
        self.tokenizer, self.reducer = build_text(recipe, shards)

    def __iter__(self) -> Iterator[Part]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        share = len(self.cursors) // workers
        buffer = PixelBuffer()
        reader = None
        if self.recipe.needs_teacher_view:
            teaching = self.recipe.teaching(sum(shard.num_samples for shard in self.shards))
            reader = ScoreReader(teaching, self.shards, self.scores)
        maker = SampleMaker(self.recipe, self.shards, buffer, reader, self.reducer)
        orders, turns = deal(self.recipe, self.shards)
        streams = [
            self._lane(maker, orders, turns, index)
            for index in range(worker * share, (worker + 1) * share)
        ]
        for stream in streams:
            stream.prefetch()
        per_lane = self.recipe.train.global_batch_size // self.num_lanes
        try:
            for step in itertools.count(self.steps_done + 1):
                if reader is not None:
                    reader.start_step(step)
                start = time.perf_counter()
                samples = [sample for stream in streams for sample in stream.take(per_lane)]
                cursors = np.array([stream.cursor for stream in streams], dtype=np.int64)
                skipped = sum((stream.skipped for stream in streams), Counter())
                repeated = sum(stream.repeated for stream in streams)
                warnings = [warning for stream in streams for warning in stream.warnings]
                for stream in streams:
                    stream.clear_reports()
                batch = collate(samples, self.tokenizer, cursors, dict(skipped), buffer, repeated)
                yield Part(batch, warnings, seconds=time.perf_counter() - start)
        except ConfigError as error:
            # DataLoader would wrap the message in a traceback of the worker.
            types = {ShardError: DataError, DataError: DataError, NotWritten: NotWritten}
            fitting = (types[kind] for kind in types if isinstance(error, kind))
            yield Part(None, error=str(error), error_type=next(fitting, ConfigError))

    def _lane(
        self, maker: SampleMaker, orders: list[SourceOrder], turns: Turns | None, index: int
    ) -> LaneStream | MixedLane:
        lane, cursor = self.first + index, self.cursors[index].tolist()
        if turns is None:
            return self._stream(maker, orders[0], lane, cursor)
        step, *places = cursor
        streams = [
            self._stream(maker, order, lane, places[3 * source : 3 * source + 3])
            for source, order in enumerate(orders)
        ]
        return MixedLane(streams, turns, lane, step)

    def _stream(
        self, maker: SampleMaker, order: SourceOrder, lane: int, cursor: list[int]
    ) -> LaneStream:
        return LaneStream(
            self.shards,
            LaneOrder(order, lane, self.recipe.data.shuffle_block),
            tuple(cursor),
            partial(maker.make, lane),
            skips_unreadable=self.recipe.data.on_shard_error == "skip",
        )


class TrainLoader:
    """Iterates over one rank's batches without end; starts at the same cursors each time.

    Attributes:
        num_lanes: number of lanes of all ranks together.
        num_workers: number of this rank's workers, which live as long as the iteration.
        advised_workers: what num_workers would be if data.workers were empty.
    """

    def __init__(
        self, dataset: LaneDataset, num_workers: int, advised_workers: int, pin_memory: bool
    ):
        self.num_lanes = dataset.num_lanes
        self.num_workers = num_workers
        self.advised_workers = advised_workers
        self.pin_memory = pin_memory
        self._dataset = dataset
        self._made: list[tuple[int, float]] = []  # images and seconds of each worker

    @property
    def crops(self) -> str:
        """Where the views are cut, data.crops."""
        return self._dataset.recipe.data.crops

    @property
    def images_per_second(self) -> float | None:
        """What this rank's workers can make together, as measured where they work; None before
        each has made two parts."""
        rates = [images / seconds if seconds else 0.0 for images, seconds in self._made]
        return sum(rates) if rates and all(rates) else None

    @property
    def cursors(self) -> Tensor:
        """Where the lanes of this rank begin, as Batch.cursors."""
        return torch.from_numpy(self._dataset.cursors)

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
            device = torch.device("cuda", torch.cuda.current_device())
            batches = run_ahead(batches, SideStream(device))
        try:
            while True:
                yield next(batches)
        finally:
            if self._dataset.scores is not None:
                self._dataset.scores.let_read()  # or what runs ahead would wait for the next epoch
            batches.close()

    def _joined(self, parts: Iterator[Part]) -> Iterator[Batch]:
        warned = set()
        num_workers = max(1, self.num_workers)
        self._made = [(0, 0.0)] * num_workers
        for step in itertools.count():
            batches = []
            for worker in range(num_workers):
                part = next(parts)
                if part.error is not None:
                    raise part.error_type(part.error)
                for warning in sorted(set(part.warnings) - warned):
                    logger.warning("%s", warning)
                    warned.add(warning)
                batches.append(part.batch)
                if step:  # the first one opened shards, and warmed up
                    images, seconds = self._made[worker]
                    self._made[worker] = images + len(part.batch), seconds + part.seconds
            yield join(batches, self.pin_memory)


def build_train_loader(
    recipe: Recipe,
    shards: list[Shard],
    rank: int,
    world_size: int,
    cursors: Tensor | None = None,
    steps_done: int = 0,
    scores: ScoreFiles | None = None,
) -> TrainLoader:
    """Builds the stream of this rank's batches of global_batch_size / world_size samples.

    Args:
        recipe: data.lanes, data.workers and data.crops may be empty; they are resolved here.
        shards: all shards of the data set, the same on every rank.
        rank: this process's rank.
        world_size: number of ranks.
        cursors: where the lanes of all ranks continue, rows as in Batch.cursors; None to start at
            the beginning.
        steps_done: how many steps the run has done there.
        scores: where the teacher's scores are kept; None where none are read.

    Raises:
        ConfigError: lanes, batch, ranks and workers do not fit, the data are too few to keep scores
            of, the cursors belong to other lanes or sources, or counts of words can't be read.
            While iterating: a shard can't be read or a lane holds nothing usable.
    """
    recipe = with_crops(recipe)
    num_samples, batch_size = sum(s.num_samples for s in shards), recipe.train.global_batch_size
    if recipe.keeps_scores and num_samples < batch_size:
        raise ConfigError(
            f"teacher.reuse is {recipe.teacher.reuse}, but the data hold {num_samples} samples, "
            f"less than a batch of {batch_size}, so that none keeps its scores for an epoch; set "
            "teacher.reuse to 1, or train.global_batch_size lower"
        )
    num_lanes = count_lanes(recipe)
    cores = _cores_per_rank()
    workers = resolve_workers(recipe.data.workers, num_lanes, world_size, cores)
    advised = resolve_workers(None, num_lanes, world_size, cores)
    num_sources = max(1, len(recipe.data.sources))
    size = 3 if num_sources == 1 else 1 + 3 * num_sources
    if cursors is None:
        cursors = torch.zeros(num_lanes, size, dtype=torch.int64)
    if len(cursors) != num_lanes:
        raise ConfigError(
            f"the checkpoint holds cursors of {len(cursors)} data lanes, but the recipe gives "
            f"{num_lanes}; set data.lanes to {len(cursors)}, or keep the batch as it was"
        )
    if cursors.shape[1] != size:
        raise ConfigError(
            f"the checkpoint holds cursors of {max(1, cursors.shape[1] // 3)} sources, but "
            f"data.sources gives {num_sources}; give the same sources"
        )
    share = num_lanes // world_size
    local = cursors[rank * share : (rank + 1) * share].numpy()
    dataset = LaneDataset(recipe, shards, num_lanes, rank * share, local, steps_done, scores)
    return TrainLoader(dataset, workers, advised, pin_memory=torch.cuda.is_available())


def with_crops(recipe: Recipe, begun: str | None = None) -> Recipe:
    """The recipe with data.crops: its own, else what the run has `begun` with, else where GPUs are
    the device, which feeds them with a third of the cores, and on a CPU the worker."""
    by_device = "device" if torch.cuda.is_available() else "worker"
    crops = recipe.data.crops or begun or by_device
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"crops": crops})})


def _cores_per_rank() -> int:
    return usable_cores() // (ranks_of_machine() or 1)
