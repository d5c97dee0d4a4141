"""Every usable sample exactly once an epoch: hundreds of drawn runs of the loader, without tars."""

from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest

from aclip.config.recipe import Recipe
from aclip.data import loader
from aclip.data.lanes import stream
from aclip.data.lanes.order import sample_rng
from aclip.data.loader import LaneDataset
from aclip.data.shards.listing import Shard, Skip

NUM_SETTINGS = 120


@dataclass(frozen=True)
class Setting:
    """A drawn data set and what it is dealt to.

    Attributes:
        bad: (shard, position in it) of the samples that can't be used.
        splits: two choices of ranks and workers that divide the lanes.
        num_steps: so many that each source has been gone through about three times.
    """

    shards: list[Shard]
    weights: list[float]
    bad: set[tuple[int, int]]
    lanes: int
    batch: int
    shuffle_block: int
    seed: int
    splits: list[tuple[int, int]]
    num_steps: int

    def size(self, source: int) -> int:
        return sum(shard.num_samples for shard in self.shards if shard.source == source)

    def recipe(self) -> Recipe:
        sources = [{"shards": "unread", "weight": weight} for weight in self.weights]
        return Recipe(
            model={"image": {"resolution": 16, "kwargs": {"patch_size": 8}}},
            teacher={"resolution": 16},
            data={
                "lanes": self.lanes,
                "shuffle_block": self.shuffle_block,
                "sources": sources if len(sources) > 1 else [],
            },
            train={"global_batch_size": self.batch, "seed": self.seed},
        )


def draw_setting(number: int) -> Setting:
    rng = np.random.default_rng(number)
    num_sources = int(rng.choice([1, 1, 2, 3]))
    shards = [
        Shard(f"{source}/{index}.tar", int(rng.integers(1, rng.choice([3, 30]))), source)
        for source in range(num_sources)
        for index in range(rng.integers(1, 8))
    ]
    everything = [(s, i) for s, shard in enumerate(shards) for i in range(shard.num_samples)]
    share = rng.choice([0, 0, 0.05, 0.3])
    bad = {sample for sample in everything if rng.random() < share}
    if share and len(shards) > num_sources:
        whole = int(rng.integers(len(shards)))  # nothing in this shard can be used
        bad |= {sample for sample in everything if sample[0] == whole}
    for source in range(num_sources):  # something of each source can
        first = next(s for s, shard in enumerate(shards) if shard.source == source)
        bad.discard((first, 0))
    lanes = int(rng.choice([1, 2, 3, 6, 8, 12, 48]))
    batch = max(2, lanes * int(rng.integers(1, 4)))
    pairs = [(r, w) for r in range(1, lanes + 1) for w in range(1, 9) if lanes % (r * w) == 0]
    weights = rng.choice([0.2, 1, 3, 7.5], num_sources).tolist()
    sizes = [sum(s.num_samples for s in shards if s.source == n) for n in range(num_sources)]
    longest = max(size * sum(weights) / weight for size, weight in zip(sizes, weights, strict=True))
    return Setting(
        shards=shards,
        weights=weights,
        bad=bad,
        lanes=lanes,
        batch=batch,
        shuffle_block=int(rng.choice([1, 4, 20])),
        seed=number,
        splits=[pairs[index] for index in rng.integers(len(pairs), size=2)],
        num_steps=min(500, round(3.3 * longest / batch) + 2),
    )


SETTINGS = [draw_setting(number) for number in range(NUM_SETTINGS)]


@dataclass(frozen=True)
class Sample:
    """A sample as the batch holds it, and where it stands in its lane's order."""

    lane: int
    source: int
    name: tuple[int, int]
    epoch: int
    position: int
    drawn: int


@dataclass(frozen=True)
class Step:
    """A global batch: joined from all ranks and workers."""

    samples: list[Sample]
    cursors: np.ndarray
    skipped: Counter
    repeated: int


@pytest.fixture
def run(monkeypatch):
    """Runs the loader's own data sets, without reading, decoding or stacking anything."""

    def read_shard(shard, start):
        shard_index = shard_indices[shard.url]
        for index in range(start, shard.num_samples):
            yield index, (shard_index, index)
        if shard_index % 3 == 0:
            yield shard.num_samples, Skip("not_in_index")

    class Maker:
        def __init__(self, recipe, shards, buffer, scores, reducer):
            self.seed, self.shards = recipe.train.seed, shards

        def make(self, lane, place, raw):
            assert raw == (place.shard, place.index)
            source, epoch, position = self.shards[place.shard].source, place.epoch, place.position
            drawn = sample_rng(self.seed, lane, epoch, position, source).integers(2**32)
            if raw in bad:
                return Skip("no_image")
            return Sample(lane, source, raw, epoch, position, int(drawn))

    def collate(samples, tokenizer, cursors, skipped, buffer, repeated):
        return Step(samples, cursors, Counter(skipped), repeated)

    shard_indices: dict[str, int] = {}
    bad: set = set()
    monkeypatch.setattr(stream, "read_shard", read_shard)
    monkeypatch.setattr(loader, "SampleMaker", Maker)
    monkeypatch.setattr(loader, "collate", collate)
    monkeypatch.setattr(loader, "build_text", lambda recipe, shards: (None, None))

    def run(setting: Setting, ranks: int, workers: int, count: int, cursors=None) -> list[Step]:
        shard_indices.clear()
        shard_indices.update({shard.url: s for s, shard in enumerate(setting.shards)})
        bad.clear()
        bad.update(setting.bad)
        if cursors is None:
            width = 3 if len(setting.weights) == 1 else 1 + 3 * len(setting.weights)
            cursors = np.zeros((setting.lanes, width), dtype=np.int64)
        recipe, share = setting.recipe(), setting.lanes // ranks
        parts = []
        for rank in range(ranks):
            first = rank * share
            local = cursors[first : first + share]
            for worker in range(workers):
                info = SimpleNamespace(id=worker, num_workers=workers)
                monkeypatch.setattr(loader, "get_worker_info", lambda info=info: info)
                dataset = LaneDataset(recipe, setting.shards, setting.lanes, first, local)
                parts.append([part.batch for part in islice(iter(dataset), count)])
        return [
            Step(
                samples=[sample for part in step for sample in part.samples],
                cursors=np.concatenate([part.cursors for part in step]),
                skipped=sum((part.skipped for part in step), Counter()),
                repeated=sum(part.repeated for part in step),
            )
            for step in zip(*parts, strict=True)
        ]

    return run


def test_the_settings_hold_every_case():
    cases = {
        "unequal shards": [len({s.num_samples for s in x.shards}) > 1 for x in SETTINGS],
        "fewer shards than lanes": [len(x.shards) < x.lanes for x in SETTINGS],
        "a batch larger than a source": [x.size(0) < x.batch for x in SETTINGS],
        "several sources": [len(x.weights) > 1 for x in SETTINGS],
        "bad samples": [len(x.bad) > 0 for x in SETTINGS],
        "more ranks": [max(x.splits)[0] > 1 for x in SETTINGS],
    }
    counts = {case: sum(having) for case, having in cases.items()}
    assert all(12 < count < NUM_SETTINGS - 4 for count in counts.values()), counts


@pytest.mark.parametrize("tenth", range(10))
def test_each_usable_sample_comes_once_a_pass_and_nothing_depends_on_ranks_and_workers(run, tenth):
    for setting in SETTINGS[tenth::10]:
        steps = run(setting, 1, 1, setting.num_steps)
        check_that_each_comes_once(setting, steps)
        again = run(setting, *setting.splits[0], setting.num_steps)
        for step, other in zip(steps, again, strict=True):
            assert step.samples == other.samples and (step.cursors == other.cursors).all()
            assert step.skipped == other.skipped and step.repeated == other.repeated
        stop = int(np.random.default_rng(setting.seed).integers(1, setting.num_steps))
        resumed = run(
            setting, *setting.splits[1], setting.num_steps - stop, steps[stop - 1].cursors
        )
        for step, other in zip(steps[stop:], resumed, strict=True):
            assert step.samples == other.samples and (step.cursors == other.cursors).all()
            assert step.repeated == other.repeated


def check_that_each_comes_once(setting: Setting, steps: list[Step]) -> None:
    """By what the batches hold alone.

    In a complete epoch a lane gives as many samples as its part holds, so those at lower positions
    are its part's usable ones; the others stand in for the part's unusable ones.
    """
    given = [defaultdict(lambda: defaultdict(list)) for _ in setting.weights]
    repeated = 0
    for step in steps:
        assert len(step.samples) == setting.batch
        assert [s.lane for s in step.samples] == sorted(s.lane for s in step.samples)
        for source, weight in enumerate(setting.weights):
            of_source = [sample for sample in step.samples if sample.source == source]
            fair = setting.batch * weight / sum(setting.weights)
            assert abs(len(of_source) - fair) < 1 + 1e-9
            # All lanes end a round in the same step.
            assert len({sample.epoch for sample in of_source}) <= 1, setting
            for sample in of_source:
                given[source][sample.epoch][sample.lane].append(sample)
        repeated += step.repeated
    num_repeated = 0
    for source, rounds in enumerate(given):
        size = setting.size(source)
        usable = {
            (s, i)
            for s, shard in enumerate(setting.shards)
            for i in range(shard.num_samples)
            if shard.source == source and (s, i) not in setting.bad
        }
        largest = max(sum(s.source == source for s in step.samples) for step in steps)
        counts, total = Counter(), 0
        for number in sorted(rounds)[:-1]:
            of_lanes = rounds[number].values()
            own = [s for lane in of_lanes for s in lane if s.position < len(lane)]
            counts.update(sample.name for sample in own)
            total += sum(len(lane) for lane in of_lanes)
            num_repeated += sum(len(lane) for lane in of_lanes) - len(own)
            if largest <= size:  # what fills no batch begins the next round
                assert (number + 1) * size - largest < total <= (number + 1) * size, setting
            whole = total // size
            assert counts.keys() <= usable
            assert {counts[name] for name in usable} <= {whole, whole + 1}, setting
            # Of the samples that came once more, the sequence holds so many, usable or not.
            more = sum(counts[name] - whole for name in usable)
            assert more <= total - whole * size
            if not setting.bad:
                assert more == total - whole * size
    assert num_repeated <= repeated and (setting.bad or repeated == 0)
