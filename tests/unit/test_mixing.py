"""Weighted sources: shares, exact order, resume, and a run on them."""

from collections import Counter

import numpy as np
import pytest

from aclip.config.recipe import Recipe
from aclip.data.find_data import find_data
from aclip.data.lanes.mixing import MixedLane
from aclip.data.lanes.order import LaneOrder
from aclip.data.lanes.stream import LaneStream
from aclip.data.shards.listing import Shard, Skip

SIZES = ((40, 30, 35), (12,), (9, 8))
"""Samples of each shard, by source."""


@pytest.fixture
def shards(write_tar):
    return [
        Shard(
            write_tar(f"{source}-{s}.tar", [(f"{source}-{s}-{i}.txt", b"x") for i in range(count)]),
            count,
            source,
        )
        for source, counts in enumerate(SIZES)
        for s, count in enumerate(counts)
    ]


def open_lane(shards, weights, lane=0, num_lanes=2, cursor=None, bad=(), seed=0):
    def prepare(shard_index, raw, epoch, position):
        return Skip("no_image") if raw.key in bad else (shards[shard_index].source, raw.key, epoch)

    taken, *places = cursor or (0,) * (1 + 2 * len(weights))
    streams = []
    for source in range(len(weights)):
        sizes = {i: shard.num_samples for i, shard in enumerate(shards) if shard.source == source}
        order = LaneOrder(sizes, lane, num_lanes, seed, shuffle_block=4, source=source)
        cursor = tuple(places[2 * source : 2 * source + 2])
        streams.append(LaneStream(shards, order, cursor, prepare))
    return MixedLane(streams, weights, lane, num_lanes, seed, taken)


@pytest.mark.parametrize(
    "weights", [(1, 1, 1), (105, 12, 17), (0.7, 0.05, 0.25), (1, 1000, 10), (1e-3, 2e-3, 7e-3)]
)
def test_every_global_batch_and_lane_holds_the_sources_by_their_weights(shards, weights):
    lanes = [open_lane(shards, weights, lane, 8) for lane in range(8)]
    of_first_lane = Counter()
    for _ in range(40):
        batch = Counter(sample[0] for lane in lanes for sample in lane.take(1))
        for source, weight in enumerate(weights):
            assert abs(batch[source] - 8 * weight / sum(weights)) < 2
    for _ in range(400):
        of_first_lane.update(sample[0] for sample in lanes[0].take(1))
    for source, weight in enumerate(weights):
        assert abs(of_first_lane[source] - 400 * weight / sum(weights)) < 4


@pytest.mark.parametrize("num_lanes", [8, 55, 64, 610])
def test_shares_over_an_epoch_are_within_a_hundredth_of_the_weights(num_lanes):
    """Whose turn it is alone, at the size of a small epoch: 30,000 samples."""
    weights, counts = (0.62, 0.3, 0.08), Counter()
    for lane in range(num_lanes):
        mixed = MixedLane([], weights, lane, num_lanes, 5, 0)
        for mixed.taken in range(30_000 // num_lanes):
            counts[mixed._turn()] += 1
    for source, weight in enumerate(weights):
        assert counts[source] / counts.total() == pytest.approx(weight, rel=0.01)


def test_a_source_goes_through_all_of_its_samples_before_one_comes_again(shards):
    # 12 samples in one shard for two lanes, which share it.
    lanes = [open_lane(shards, (1, 3, 1), lane) for lane in range(2)]
    keys = Counter()
    for lane in lanes:
        samples = lane.take(60)
        keys.update(key for source, key, epoch in samples if source == 1 and epoch == 0)
        for source in range(3):
            epochs = [epoch for its, _, epoch in samples if its == source]
            assert epochs == sorted(epochs)
    assert keys == Counter({f"1-0-{i}": 1 for i in range(12)})


def test_bad_samples_change_no_shares_and_no_other_samples_order(shards):
    weights = (2, 1, 1)
    bad = {f"0-1-{i}" for i in range(0, 30, 2)}
    whole, good = (
        open_lane(shards, weights).take(200),
        open_lane(shards, weights, bad=bad).take(150),
    )
    assert [sample[0] for sample in good] == [sample[0] for sample in whole[:150]]
    for source in range(3):
        expected = [s for s in whole if s[0] == source and s[1] not in bad]
        found = [s for s in good if s[0] == source]
        assert found == expected[: len(found)] and len(found) > 30


def test_a_mixed_lane_resumes_at_every_cursor(shards):
    weights, bad = (3, 1, 2), {"0-0-3", "1-0-1", "2-1-0"}
    lane = open_lane(shards, weights, 1, bad=bad)
    samples, cursors = [], []
    for _ in range(120):
        cursors.append(lane.cursor)
        samples += lane.take(1)
    for count in range(0, 120, 7):
        resumed = open_lane(shards, weights, 1, cursor=cursors[count], bad=bad)
        assert resumed.take(120 - count) == samples[count:]


def test_sources_draw_different_orders_and_the_first_as_without_sources(write_tar):
    url = write_tar("x.tar", [(f"{i}.txt", b"x") for i in range(50)])
    shards = [Shard(url, 50, 0), Shard(url, 50, 1)]
    samples = open_lane(shards, (1, 1), num_lanes=1).take(100)
    first, second = ([key for its, key, _ in samples if its == source] for source in range(2))
    assert first[:30] != second[:30]
    order = LaneOrder({0: 50}, lane=0, num_lanes=1, seed=0, shuffle_block=4)
    alone = LaneStream(shards[:1], order, (0, 0), lambda index, raw, *place: raw.key)
    assert first == alone.take(len(first))


def test_seeds_change_whose_turn_it_is(shards):
    turns = {
        tuple(sample[0] for sample in open_lane(shards, (1, 1, 1), seed=seed).take(30))
        for seed in range(5)
    }
    assert len(turns) == 5


def test_the_turns_are_those_of_the_documented_circle(shards):
    """By hand, in floats: an arc of 1/4 is the first source's, the rest the second's."""
    two = [shard for shard in shards if shard.source < 2]
    lane = open_lane(two, (1, 3), lane=1, num_lanes=2, seed=9)
    rng = np.random.default_rng([5, 9])
    own = int(rng.permutation(2)[1])
    turned, shift = rng.integers(2**64 - 1, size=2, dtype=np.uint64) / 2**64
    plastic = np.roots([1, 0, -1, -1])[0].real  # p^3 = p + 1
    expected = []
    for step in range(50):
        place = (own + int(2 * ((turned + step / plastic) % 1))) % 2
        angle = (place + (shift + step / plastic**2) % 1) / 2
        expected.append(0 if angle < 0.25 else 1)
    assert [sample[0] for sample in lane.take(50)] == expected


def test_a_recipes_sources_are_found_in_their_order_and_few_shards_are_warned_of(
    write_tar, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("ACLIP_CACHE", str(tmp_path / "cache"))
    for name, count in (("a0", 2), ("a1", 3), ("b", 4)):
        write_tar(f"{name}.tar", [(f"{i}.txt", b"x") for i in range(count)])
    sources = [
        {"shards": f"{tmp_path}/b.tar", "weight": 1},
        {"shards": f"{tmp_path}/a*.tar", "weight": 2},
    ]
    recipe = Recipe(
        data={"sources": sources}, teacher={"resolution": 224}, train={"global_batch_size": 4}
    )
    shards, val = find_data(recipe)
    assert val == [] and shards == [
        Shard(f"{tmp_path}/b.tar", 4, 0),
        Shard(f"{tmp_path}/a0.tar", 2, 1),
        Shard(f"{tmp_path}/a1.tar", 3, 1),
    ]
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1 and said[0].startswith("warning: data.sources.0 has 1 shards for 2 data")
