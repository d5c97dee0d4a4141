"""Weighted sources: shares, exact order, resume, and a run on them."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from aclip.config.recipe import Recipe
from aclip.data.find_data import find_data
from aclip.data.lanes.mixing import MixedLane, Turns, deal_sources
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


def open_lane(shards, weights, lane=0, num_lanes=2, cursor=None, bad=(), seed=0, share=1):
    """A lane that gives `share` samples to each batch."""

    def prepare(place, raw):
        source = shards[place.shard].source
        return Skip("no_image") if raw.key in bad else (source, raw.key, place.epoch)

    sizes = [{} for _ in weights]
    for index, shard in enumerate(shards):
        sizes[shard.source][index] = shard.num_samples
    orders, turns = deal_sources(sizes, weights, num_lanes * share, num_lanes, seed)
    step, *places = cursor or (0,) * (1 + 3 * len(weights))
    streams = [
        LaneStream(shards, LaneOrder(order, lane, 4), tuple(places[3 * source :][:3]), prepare)
        for source, order in enumerate(orders)
    ]
    return MixedLane(streams, turns, lane, step)


def take(lane: MixedLane, count: int) -> list:
    """The samples of so many steps, of a lane that gives one to each."""
    return [sample for _ in range(count) for sample in lane.take(1)]


@pytest.mark.parametrize(
    "weights", [(1, 1, 1), (105, 12, 17), (0.7, 0.05, 0.25), (1, 1000, 10), (1e-3, 2e-3, 7e-3)]
)
def test_every_global_batch_and_lane_holds_the_sources_by_their_weights(shards, weights):
    lanes = [open_lane(shards, weights, lane, 8) for lane in range(8)]
    of_first_lane = Counter()
    for _ in range(40):
        batch = Counter(sample[0] for lane in lanes for sample in lane.take(1))
        for source, weight in enumerate(weights):
            assert abs(batch[source] - 8 * weight / sum(weights)) < 1
    for _ in range(400):
        of_first_lane.update(sample[0] for sample in lanes[0].take(1))
    for source, weight in enumerate(weights):
        assert abs(of_first_lane[source] - 400 * weight / sum(weights)) < 4


@pytest.mark.parametrize("num_lanes", [8, 55, 64, 610])
def test_shares_over_an_epoch_are_within_a_hundredth_of_the_weights(num_lanes):
    """Whose turn it is alone, at the size of a small epoch: 30,000 samples."""
    weights = (0.62, 0.3, 0.08)
    turns = Turns(weights, [10_000] * 3, num_lanes, num_lanes, 5)
    counts = turns.of_steps(0, 30_000 // num_lanes).sum(axis=1)
    for source, weight in enumerate(weights):
        assert counts[source] / counts.sum() == pytest.approx(weight, rel=0.01)


def test_a_source_goes_through_all_of_its_samples_before_one_comes_again(shards):
    lanes = [open_lane(shards, (1, 3, 1), lane) for lane in range(2)]
    counts, rounds = [Counter(), Counter(), Counter()], [0, 0, 0]
    for _ in range(300):
        samples = [sample for lane in lanes for sample in lane.take(1)]
        for source, key, number in samples:
            # In step: no lane is in a later round of a source than another.
            assert number >= rounds[source]
            rounds[source] = number
            counts[source][key] += 1
    for source, of_source in enumerate(counts):
        # Before one comes for the third time all have come; in between lanes stand in a round's
        # midst, and a round begins with what the last one left.
        passes = of_source.total() / sum(SIZES[source])
        assert rounds[source] >= int(passes) - 1 and max(of_source.values()) <= passes + 2
        if passes > 3:
            assert len(of_source) == sum(SIZES[source])
            assert min(of_source.values()) >= passes - 2


def test_a_round_ends_before_the_first_step_that_it_can_not_fill(shards):
    weights, num_samples = (2, 1, 0.25, 2), [41, 300, 5, 3]
    turns = Turns(weights, num_samples, batch_size=12, num_lanes=4, seed=3)
    taken, ends, starts = [0] * 4, [0] * 4, [[], [], [], []]
    for step in range(400):
        counts = turns.of_step(step)
        assert counts.sum(axis=0).tolist() == [3, 3, 3, 3]
        for source, count in enumerate(counts.sum(axis=1).tolist()):
            for number in range(ends[source], 2000):
                if taken[source] + count <= number * num_samples[source]:
                    break
                ends[source] += 1
                if starts[source][-1:] != [(step, taken[source])]:
                    starts[source].append((step, taken[source]))
            taken[source] += count
    for source, rounds in enumerate(starts):
        assert [turns.round(source, number) for number in range(len(rounds))] == rounds
        for number, ((first, begin), (end, stop)) in enumerate(pairwise(rounds)):
            shares = sum(turns.of_step(step)[source] for step in range(first, end))
            expected = begin + np.cumsum([0, *np.broadcast_to(shares, 4)])
            assert turns.parts(source, number).tolist() == expected.tolist()
            assert expected[-1] == stop
    assert len(starts[0]) > 40 and len(starts[2]) > 40 and len(starts[3]) == 400


def test_far_rounds_are_found_without_asking_for_the_ones_before():
    weights, num_samples = (1, 2e-3), [1000, 1000]
    turns = Turns(weights, num_samples, batch_size=10, num_lanes=5, seed=0)
    first, taken = turns.round(1, 3)  # after about 3 x 1000 / 10 x 501 steps
    assert taken == 3000 and first == pytest.approx(150_300, rel=1e-3)
    assert turns.of_steps(0, first)[1].sum() == 3000
    assert turns.of_steps(first, first + 1)[1].sum() == 1


def test_bad_samples_change_no_shares_and_no_other_samples_order(shards):
    weights = (2, 1, 1)
    bad = {f"0-1-{i}" for i in range(0, 30, 2)}
    whole, good = (
        take(open_lane(shards, weights), 200),
        take(open_lane(shards, weights, bad=bad), 150),
    )
    assert [sample[0] for sample in good] == [sample[0] for sample in whole[:150]]
    for source, number in {(sample[0], sample[2]) for sample in good}:
        expected = [s for s in whole if s[::2] == (source, number) and s[1] not in bad]
        found = [s for s in good if s[::2] == (source, number)]
        # What makes up for bad ones comes last in its round.
        assert found[: len(expected)] == expected[: len(found)]


def test_a_mixed_lane_resumes_at_every_cursor(shards):
    weights, bad = (3, 1, 2), {"0-0-3", "1-0-1", "2-1-0"}
    lane = open_lane(shards, weights, 1, bad=bad)
    samples, cursors = [], []
    for _ in range(120):
        cursors.append(lane.cursor)
        samples += lane.take(1)
    for count in range(0, 120, 7):
        resumed = open_lane(shards, weights, 1, cursor=cursors[count], bad=bad)
        assert take(resumed, 120 - count) == samples[count:]


def test_sources_draw_different_orders_and_the_first_as_without_sources(write_tar):
    url = write_tar("x.tar", [(f"{i}.txt", b"x") for i in range(50)])
    shards = [Shard(url, 50, 0), Shard(url, 50, 1)]
    samples = take(open_lane(shards, (1, 1), num_lanes=1), 100)
    first, second = ([key for its, key, _ in samples if its == source] for source in range(2))
    assert first[:30] != second[:30]
    (order,), turns = deal_sources([{0: 50}], [1], batch_size=1, num_lanes=1, seed=0)
    alone = LaneStream(shards[:1], LaneOrder(order, 0, 4), (0, 0, 0), lambda place, raw: raw.key)
    assert turns is None and first == alone.take(len(first))


def test_seeds_change_whose_turn_it_is(shards):
    turns = {
        tuple(sample[0] for sample in take(open_lane(shards, (1, 1, 1), seed=seed), 30))
        for seed in range(5)
    }
    assert len(turns) == 5


def test_the_turns_are_the_documented_ones():
    """By hand, in floats: weights 1 : 3 : 2 of a row of 7 have borders at 7/6 and 28/6."""
    turns = Turns((1, 3, 2), [100] * 3, batch_size=7, num_lanes=7, seed=9)
    rng = np.random.default_rng([5, 9])
    places = rng.permutation(7)
    starts = rng.integers(2**64 - 1, size=2, dtype=np.uint64, endpoint=True) / 2**64
    plastic = np.roots([1, 0, -1, -1])[0].real  # p^3 = p + 1
    for step in range(50):
        threshold = (starts[1] + step / plastic**2) % 1
        turned = int(7 * ((starts[0] + step / plastic) % 1))
        borders = [int(border) + int(threshold < border % 1) for border in (7 / 6, 28 / 6)]
        row = [sum(place >= border for border in borders) for place in range(7)]
        counts = turns.of_step(step)
        for lane in range(7):
            assert counts[row[(places[lane] - turned) % 7], lane] == 1
        assert counts.sum() == 7


def test_a_lane_takes_its_share_of_the_row_in_turn():
    """12 samples for 4 lanes, half of each source: of 6 places two lanes get 2, two lanes 1."""
    turns = Turns((1, 1), [100] * 2, batch_size=12, num_lanes=4, seed=1)
    for step in range(20):
        counts = turns.of_step(step)
        assert sorted(counts[0].tolist()) == [1, 1, 2, 2] and (counts.sum(axis=0) == 3).all()
    assert (turns.of_steps(0, 40) == sum(turns.of_step(step) for step in range(40))).all()


def test_a_recipes_sources_are_found_in_their_order(write_tar, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ACLIP_CACHE", str(tmp_path / "cache"))
    for name, count in (("a0", 2), ("a1", 3), ("b", 4)):
        write_tar(f"{name}.tar", [(f"{i}.{s}", b"x") for i in range(count) for s in ("jpg", "txt")])
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
    assert capsys.readouterr().out == ""
