"""The order of a lane, from sizes and seeds alone: hundreds of drawn settings, without shards."""

import random
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest

from aclip.data.lanes.order import LaneOrder

EPOCHS = (0, 1, 2, 17)


@dataclass(frozen=True)
class Setting:
    """A drawn source and what it is dealt to."""

    sizes: dict[int, int]
    num_lanes: int
    seed: int
    shuffle_block: int
    source: int

    def order(self, lane: int) -> LaneOrder:
        return LaneOrder(
            self.sizes, lane, self.num_lanes, self.seed, self.shuffle_block, self.source
        )

    def everything(self) -> Counter:
        return Counter((shard, i) for shard, size in self.sizes.items() for i in range(size))


def draw_setting(number: int) -> Setting:
    rng = random.Random(number)
    num_shards = rng.randint(1, 20)
    # Of a data set whose other shards belong to other sources.
    shards = sorted(rng.sample(range(2 * num_shards), num_shards))
    return Setting(
        sizes={shard: rng.choice([1, 2, 7, 10, 10, 10, 25]) for shard in shards},
        num_lanes=rng.choice([1, 2, 3, 5, 8, 16, 60]),
        seed=rng.randrange(2**32),
        shuffle_block=rng.choice([1, 2, 8, 1000]),
        source=rng.randrange(3),
    )


SETTINGS = [draw_setting(number) for number in range(150)]


def sequence(order: LaneOrder, epoch: int, start: int = 0) -> list[tuple[int, int]]:
    """The (shard, position in it) of a lane's samples from a position to the end of the epoch."""
    lane_epoch = order.epoch(epoch)
    return [lane_epoch.sample_at(position) for position in range(start, lane_epoch.num_samples)]


def as_read(order: LaneOrder, epoch: int, start: int) -> list[tuple[int, int]]:
    """The same by reading forward from the block of `start`, as a stream that resumes does."""
    lane_epoch = order.epoch(epoch)
    if start == lane_epoch.num_samples:
        assert lane_epoch.spans_from(start) == []
        return []
    first = lane_epoch.block(start).start
    left = [(span.shard, i) for span in lane_epoch.spans_from(first) for i in span.samples]
    samples = []
    while first < lane_epoch.num_samples:
        block = lane_epoch.block(first)
        read, left = left[: len(block)], left[len(block) :]
        samples += [read[index] for index in lane_epoch.shuffled(block)]
        first = block.stop
    assert not left
    return samples[start - lane_epoch.block(start).start :]


def test_the_settings_hold_every_case():
    shared = [len(setting.sizes) < setting.num_lanes for setting in SETTINGS]
    uneven = [len(setting.sizes) % setting.num_lanes > 0 for setting in SETTINGS]
    empty = [setting.everything().total() < setting.num_lanes for setting in SETTINGS]
    assert min(sum(shared), sum(uneven), len(SETTINGS) - sum(shared)) > 20 and sum(empty) > 5


def test_all_lanes_together_give_each_sample_of_the_source_once_an_epoch():
    for setting in SETTINGS:
        for epoch in EPOCHS:
            dealt = Counter()
            for lane in range(setting.num_lanes):
                dealt.update(sequence(setting.order(lane), epoch))
            assert dealt == setting.everything(), (setting, epoch)


def test_an_order_depends_on_seed_lane_and_epoch_only():
    """Not on what was asked for before, nor on the global random state."""
    for number, setting in enumerate(SETTINGS):
        lane = number % setting.num_lanes
        order = setting.order(lane)
        forward = [sequence(order, epoch) for epoch in EPOCHS]
        np.random.seed(number)
        random.seed(number)
        backward = [sequence(order, epoch) for epoch in reversed(EPOCHS)]
        afresh = [sequence(setting.order(lane), epoch) for epoch in EPOCHS]
        assert forward == backward[::-1] == afresh, setting


def test_a_lane_resumes_at_every_position_with_the_same_sequence():
    for number, setting in enumerate(SETTINGS):
        order = setting.order(number % setting.num_lanes)
        for epoch in EPOCHS[:2]:
            whole = sequence(order, epoch)
            positions = range(len(whole) + 1)
            if len(whole) > 12:
                positions = sorted(random.Random(number).sample(positions, 12))
            for start in positions:
                assert as_read(order, epoch, start) == whole[start:], (setting, epoch, start)


def test_samples_are_shuffled_within_their_blocks_of_consecutive_reading():
    for number, setting in enumerate(SETTINGS):
        lane_epoch = setting.order(number % setting.num_lanes).epoch(1)
        in_order = [(span.shard, i) for span in lane_epoch.spans for i in span.samples]
        shuffled = sequence(setting.order(number % setting.num_lanes), 1)
        assert len(in_order) == lane_epoch.num_samples
        for start in range(0, lane_epoch.num_samples, setting.shuffle_block):
            end = min(start + setting.shuffle_block, lane_epoch.num_samples)
            assert sorted(shuffled[start:end]) == sorted(in_order[start:end]), setting
            assert lane_epoch.block(start) == lane_epoch.block(end - 1) == range(start, end)


def test_spans_are_read_forward_and_no_shard_twice():
    for number, setting in enumerate(SETTINGS):
        for epoch in EPOCHS:
            spans = setting.order(number % setting.num_lanes).epoch(epoch).spans
            shards = [span.shard for span in spans]
            assert len(set(shards)) == len(shards) and set(shards) <= setting.sizes.keys()
            for span in spans:
                assert span.samples.step > 0
                assert all(0 <= i < setting.sizes[span.shard] for i in span.samples)


def test_one_lane_counts_what_lies_beyond_the_index_of_a_shard():
    for setting in SETTINGS:
        for epoch in EPOCHS[:2]:
            counting = Counter()
            for lane in range(setting.num_lanes):
                lane_epoch = setting.order(lane).epoch(epoch)
                if lane_epoch.counts_unlisted:
                    counting.update(span.shard for span in lane_epoch.spans)
            assert counting == Counter(dict.fromkeys(setting.sizes, 1)), setting


def test_lanes_with_shards_of_their_own_take_them_whole():
    for setting in SETTINGS:
        if len(setting.sizes) < setting.num_lanes:
            continue
        counts = []
        for lane in range(setting.num_lanes):
            order = setting.order(lane)
            spans = order.epoch(3).spans
            assert not order.shares_shards
            assert all(span.samples == range(setting.sizes[span.shard]) for span in spans)
            counts.append(len(spans))
        assert max(counts) - min(counts) <= 1 and sum(counts) == len(setting.sizes)


def test_lanes_that_share_shards_are_equally_long():
    for setting in SETTINGS:
        if len(setting.sizes) >= setting.num_lanes:
            continue
        orders = [setting.order(lane) for lane in range(setting.num_lanes)]
        assert all(order.shares_shards for order in orders)
        lengths = [order.epoch(3).num_samples for order in orders]
        assert max(lengths) - min(lengths) <= 1, setting


@pytest.mark.parametrize("lane", range(5))
@pytest.mark.parametrize("source", [0, 2])
def test_shared_shards_are_dealt_sample_by_sample_as_documented(lane, source):
    sizes, num_lanes, seed, epoch = {1: 4, 4: 1, 5: 6}, 5, 11, 2
    words = [1, seed, epoch] if source == 0 else [4, source, 1, seed, epoch]
    rng = np.random.default_rng(words)
    shards = [list(sizes)[place] for place in rng.permutation(3)]
    first = (lane + rng.integers(num_lanes)) % num_lanes
    end_to_end = [(shard, i) for shard in shards for i in range(sizes[shard])]
    order = LaneOrder(sizes, lane, num_lanes, seed, shuffle_block=1, source=source)
    assert sequence(order, epoch) == end_to_end[first::num_lanes]


def test_epochs_seeds_lanes_and_sources_differ():
    sizes = dict.fromkeys(range(12), 10)
    orders = {
        "first": sequence(LaneOrder(sizes, 0, 2, 3, 8), 0),
        "epoch": sequence(LaneOrder(sizes, 0, 2, 3, 8), 1),
        "seed": sequence(LaneOrder(sizes, 0, 2, 4, 8), 0),
        "lane": sequence(LaneOrder(sizes, 1, 2, 3, 8), 0),
        "source": sequence(LaneOrder(sizes, 0, 2, 3, 8, source=1), 0),
    }
    assert len({tuple(order) for order in orders.values()}) == len(orders)


def test_each_block_of_each_lane_is_shuffled_by_itself():
    shuffles = set()
    for lane in range(2):
        lane_epoch = LaneOrder({0: 40, 1: 40}, lane, 2, 0, shuffle_block=20).epoch(0)
        for start in (0, 20):
            shuffles.add(tuple(lane_epoch.shuffled(lane_epoch.block(start))))
    assert len(shuffles) == 4
