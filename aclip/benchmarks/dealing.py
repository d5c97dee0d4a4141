"""How often each sample comes: the order of a run's samples, worked out from sizes alone.

Every worker's lanes are dealt as in a run, by the same code, but no shard is read.
"""

import argparse
import json
import math
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from aclip.cli import text_table
from aclip.data.demo import TRAIN_SHARD_SIZE, TRAIN_SHARDS
from aclip.data.lanes.counts import resolve_lanes
from aclip.data.lanes.mixing import deal_sources
from aclip.data.lanes.order import LaneOrder, Span
from aclip.errors import ConfigError
from aclip.files import check_writable, write_whole

SHUFFLE_BLOCK = 512
UNEVEN = (600, 1000)


@dataclass(frozen=True)
class DataSet:
    """Shards of these sizes, and the batch that a run takes of them."""

    name: str
    sizes: list[int]
    batch_size: int


@dataclass(frozen=True)
class Dealt:
    """One row of the table.

    Attributes:
        num_workers: of all ranks together, a divisor of `lanes`.
        unseen: samples that did not come in the first epoch.
        carried: samples that the first epoch leaves to the second, since they fill no batch.
        shard_passes, sample_passes: the least and the most after the last epoch; a shard's are the
            mean of its samples'.
        lane_epochs: how many epochs the slowest and the fastest lane have gone through then.
        opened: how often a shard is opened in an epoch.
        seconds: that this took.
    """

    name: str
    samples: int
    batch_size: int
    lanes: int
    num_workers: int
    unseen: int
    carried: int
    shard_passes: tuple[float, float]
    sample_passes: tuple[int, int]
    lane_epochs: tuple[int, int]
    opened: float
    seconds: float


def benchmark_dealing(arguments: argparse.Namespace) -> int:
    """Runs `launch/benchmark.py --dealing`; returns the exit status.

    Raises:
        ConfigError: --sizes that can't be understood, or a number below 1.
    """
    numbers = (arguments.ranks, arguments.workers, arguments.epochs, arguments.batch_size or 1)
    if min(numbers) < 1:
        raise ConfigError("--ranks, --workers, --epochs or --batch_size is below 1; give 1 or more")
    if arguments.json:
        check_writable(Path(arguments.json).absolute().parent, "the folder of --json")
    sets = [read_sizes(text, arguments.batch_size or 4096) for text in arguments.sizes]
    rows = [
        deal(each, arguments.ranks * arguments.workers, arguments.epochs)
        for each in sets or default_sets()
    ]
    print(format_table(rows, arguments.epochs))
    if arguments.json:
        write_whole(Path(arguments.json), json.dumps([asdict(row) for row in rows], indent=1))
    return 0


def default_sets() -> list[DataSet]:
    """Common data sets in webdataset's usual layout, the demo's, and one of unequal shards."""
    uneven = np.random.default_rng(0).integers(*UNEVEN, size=1024, endpoint=True)
    return [
        DataSet("YFCC-15M", [10_115] * 1483, 4096),
        DataSet("CC12M", [10_000] * 1242, 4096),
        DataSet("CC3M", [10_000] * 332, 4096),
        DataSet("the built-in scenes", [TRAIN_SHARD_SIZE] * TRAIN_SHARDS, 128),
        DataSet("1,024 shards of 600 to 1,000", uneven.tolist(), 4096),
    ]


def read_sizes(text: str, batch_size: int) -> DataSet:
    """A set written as SHARDSxSAMPLES.

    Raises:
        ConfigError: it is written in another way.
    """
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise ConfigError(f"--sizes has {text}; give shards x samples of each, such as 1483x10000")
    return DataSet(text, [int(match[2])] * int(match[1]), batch_size)


def deal(data: DataSet, num_workers: int, epochs: int) -> Dealt:
    """Deals `epochs` epochs of a set to the lanes of as many of the workers as divide them."""
    start = time.perf_counter()
    lanes = resolve_lanes(None, data.batch_size)
    num_workers = math.gcd(num_workers, lanes)
    share = lanes // num_workers
    by_epoch: list[list[Span]] = [[] for _ in range(epochs)]
    given = np.zeros((lanes, epochs), dtype=np.int64)
    for worker in range(num_workers):
        # Anew for each worker, as in a run.
        sizes = dict(enumerate(data.sizes))
        (order,), _ = deal_sources([sizes], [1.0], data.batch_size, lanes, seed=0)
        for lane in range(worker * share, (worker + 1) * share):
            lane_order = LaneOrder(order, lane, SHUFFLE_BLOCK)
            for epoch in range(epochs):
                lane_epoch = lane_order.epoch(epoch)
                by_epoch[epoch] += lane_epoch.spans(range(lane_epoch.num_samples))
                given[lane, epoch] = lane_epoch.num_samples
    total = sum(data.sizes)
    after_first, after_all = (
        _count(data.sizes, [span for spans in by_epoch[:number] for span in spans])
        for number in (1, epochs)
    )
    starts = np.cumsum([0, *data.sizes[:-1]])
    of_shards = np.add.reduceat(after_all, starts) / data.sizes
    done = given.cumsum(axis=1)
    finished = (done <= done[:, -1].min()).sum(axis=1)
    return Dealt(
        name=data.name,
        samples=total,
        batch_size=data.batch_size,
        lanes=lanes,
        num_workers=num_workers,
        unseen=int((after_first == 0).sum()),
        carried=total - int(given[:, 0].sum()),
        shard_passes=(float(of_shards.min()), float(of_shards.max())),
        sample_passes=(int(after_all.min()), int(after_all.max())),
        lane_epochs=(int(finished.min()), int(finished.max())),
        opened=sum(map(len, by_epoch)) / epochs,
        seconds=time.perf_counter() - start,
    )


def format_table(rows: list[Dealt], epochs: int) -> str:
    """The rows as text."""
    header = [
        "",
        "samples",
        "batch",
        "lanes",
        "workers",
        "not seen in the first epoch",
        "carried into the second",
        f"passes of a shard after {epochs}",
        "of a sample",
        "lanes' epochs",
        "shards opened an epoch",
        "seconds",
    ]
    lines = [header]
    for row in rows:
        lines.append(
            [
                row.name,
                f"{row.samples:,}",
                f"{row.batch_size:,}",
                f"{row.lanes:,}",
                f"{row.num_workers:,}",
                f"{row.unseen:,} ({row.unseen / row.samples:.2%})",
                f"{row.carried:,}",
                "{:.2f} to {:.2f}".format(*row.shard_passes),
                "{} to {}".format(*row.sample_passes),
                "{} to {}".format(*row.lane_epochs),
                f"{row.opened:,.0f}",
                f"{row.seconds:.1f}",
            ]
        )
    return text_table(lines)


def _count(sizes: list[int], spans: list[Span]) -> np.ndarray:
    """(samples,) int64: how often each sample lies in the spans."""
    firsts = np.cumsum([0, *sizes])
    # An epoch of less than a batch may have no span, and an empty list would be of floats.
    fields = [(span.shard, span.samples.start, span.samples.stop) for span in spans]
    shards, starts, stops = np.array(fields, dtype=np.int64).reshape(-1, 3).T
    changes = np.zeros(firsts[-1] + 1, dtype=np.int64)
    np.add.at(changes, firsts[shards] + starts, 1)
    np.add.at(changes, firsts[shards] + stops, -1)
    return changes.cumsum()[:-1]
