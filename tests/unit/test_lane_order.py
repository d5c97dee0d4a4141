"""The order of a lane, from sizes and seeds alone: hundreds of drawn settings, without shards."""

import random
from collections import Counter
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import numpy as np
import pytest

from aclip.data.lanes.order import LaneOrder, SourceOrder, even_parts

EPOCHS = (0, 1, 2, 17)


def open_order(sizes, lane, num_lanes, seed, shuffle_block, source=0, share=1) -> LaneOrder:
    """The order of a lane that gives `share` samples to each batch."""
    parts = partial(even_parts, sum(sizes.values()), share * num_lanes, num_lanes)
    return LaneOrder(SourceOrder(sizes, seed, parts, source), lane, shuffle_block)


@dataclass(frozen=True)
class Setting:
    """A drawn source and what it is dealt to."""

    sizes: dict[int, int]
    num_lanes: int
    share: int
    seed: int
    shuffle_block: int
    source: int

    @property
    def batch(self) -> int:
        return self.share * self.num_lanes

    def order(self, lane: int) -> LaneOrder:
        return open_order(
            self.sizes,
            lane,
            self.num_lanes,
            self.seed,
            self.shuffle_block,
            self.source,
            self.share,
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
        share=rng.choice([1, 1, 2, 3]),
        seed=rng.randrange(2**32),
        shuffle_block=rng.choice([1, 2, 8, 1000]),
        source=rng.randrange(3),
    )


SETTINGS = [draw_setting(number) for number in range(150)]


def sequence(order: LaneOrder, epoch: int, start: int = 0, beyond: int = 0) -> list:
    """The (shard, position in it) of a lane's samples from a position to the end of its part, and
    `beyond` more."""
    lane_epoch = order.epoch(epoch)
    end = lane_epoch.num_samples + beyond
    return [lane_epoch.sample_at(position) for position in range(start, end)]


def as_read(order: LaneOrder, epoch: int, start: int, beyond: int) -> list[tuple[int, int]]:
    """The same by reading forward from the block of `start`, as a stream that resumes does."""
    lane_epoch = order.epoch(epoch)
    first = lane_epoch.block(start).start
    skip, samples = start - first, []
    while first < lane_epoch.num_samples + beyond:
        block = lane_epoch.block(first)
        read = [(span.shard, i) for span in lane_epoch.spans(block) for i in span.samples]
        assert len(read) == len(block)
        samples += [read[index] for index in lane_epoch.shuffled(block)]
        first = block.stop
    return samples[skip : lane_epoch.num_samples + beyond - start + skip]


def end_to_end(setting: Setting, num_passes: int) -> list[tuple[int, int]]:
    """The source's sequence as order.py documents it."""
    samples, shards = [], list(setting.sizes)
    for number in range(num_passes):
        words = [1, setting.seed, number]
        rng = np.random.default_rng([4, setting.source, *words] if setting.source else words)
        for place in rng.permutation(len(shards)):
            samples += [(shards[place], i) for i in range(setting.sizes[shards[place]])]
    return samples


def test_the_settings_hold_every_case():
    fewer = [len(setting.sizes) < setting.num_lanes for setting in SETTINGS]
    uneven = [len(setting.sizes) % setting.num_lanes > 0 for setting in SETTINGS]
    empty = [setting.everything().total() < setting.batch for setting in SETTINGS]
    assert min(sum(fewer), sum(uneven), len(SETTINGS) - sum(fewer)) > 20 and sum(empty) > 5


def test_all_lanes_together_give_each_sample_of_the_source_once_a_pass():
    """Up to the rest of less than one batch that the next epoch begins with."""
    for setting in SETTINGS:
        everything = setting.everything()
        orders = [setting.order(lane) for lane in range(setting.num_lanes)]
        dealt = Counter()
        for epoch in range(4):
            for order in orders:
                dealt.update(sequence(order, epoch))
            end = (epoch + 1) * everything.total()
            assert end - setting.batch < dealt.total() <= end, (setting, epoch)
            counts = [dealt[sample] for sample in everything]
            whole = dealt.total() // everything.total()
            assert set(counts) <= {whole, whole + 1} and sum(counts) == dealt.total()


def test_an_order_depends_on_seed_lane_and_epoch_only():
    """Not on what was asked for before, nor on the global random state."""
    for number, setting in enumerate(SETTINGS):
        lane = number % setting.num_lanes
        order = setting.order(lane)
        forward = [sequence(order, epoch, beyond=3) for epoch in EPOCHS]
        np.random.seed(number)
        random.seed(number)
        backward = [sequence(order, epoch, beyond=3) for epoch in reversed(EPOCHS)]
        afresh = [sequence(setting.order(lane), epoch, beyond=3) for epoch in EPOCHS]
        assert forward == backward[::-1] == afresh, setting


def test_a_lane_resumes_at_every_position_with_the_same_sequence():
    for number, setting in enumerate(SETTINGS):
        order = setting.order(number % setting.num_lanes)
        for epoch in EPOCHS[:2]:
            whole = sequence(order, epoch, beyond=9)
            positions = range(len(whole) + 1)
            if len(whole) > 12:
                positions = sorted(random.Random(number).sample(positions, 12))
            for start in positions:
                assert as_read(order, epoch, start, 9) == whole[start:], (setting, epoch, start)


def test_samples_are_shuffled_within_their_blocks_of_consecutive_reading():
    for number, setting in enumerate(SETTINGS):
        lane_epoch = setting.order(number % setting.num_lanes).epoch(1)
        spans = lane_epoch.spans(range(lane_epoch.num_samples))
        in_order = [(span.shard, i) for span in spans for i in span.samples]
        shuffled = sequence(setting.order(number % setting.num_lanes), 1)
        assert len(in_order) == lane_epoch.num_samples
        for start in range(0, lane_epoch.num_samples, setting.shuffle_block):
            end = min(start + setting.shuffle_block, lane_epoch.num_samples)
            assert sorted(shuffled[start:end]) == sorted(in_order[start:end]), setting
            assert lane_epoch.block(start) == lane_epoch.block(end - 1) == range(start, end)


def test_spans_are_read_forward_and_lie_in_their_shards():
    for number, setting in enumerate(SETTINGS):
        for epoch in EPOCHS:
            lane_epoch = setting.order(number % setting.num_lanes).epoch(epoch)
            spans = lane_epoch.spans(range(lane_epoch.num_samples))
            assert {span.shard for span in spans} <= setting.sizes.keys()
            ends = list(accumulate(len(span.samples) for span in spans))
            for span, end in zip(spans, ends, strict=True):
                assert span.samples.step > 0 and len(span.samples) > 0
                assert all(0 <= i < setting.sizes[span.shard] for i in span.samples)
                assert lane_epoch.end_of_span(end - 1) == end


def test_one_lane_of_a_pass_reads_the_last_sample_of_a_shard():
    """Which is where the samples beyond the index of the shard are counted."""
    for setting in SETTINGS:
        last = Counter()
        for lane in range(setting.num_lanes):
            lane_epoch = setting.order(lane).epoch(0)
            for span in lane_epoch.spans(range(lane_epoch.num_samples)):
                last[span.shard] += span.samples.stop == setting.sizes[span.shard]
        assert set(last.values()) <= {0, 1} and last.keys() <= setting.sizes.keys(), setting
        left = setting.everything().total() % setting.batch
        assert sum(last.values()) >= len(setting.sizes) - left


def test_lanes_take_consecutive_parts_of_the_source_as_documented():
    """Odd lanes take the shards of their part in reverse."""
    for setting in SETTINGS:
        for epoch in (0, 1, 3):
            size = setting.everything().total()
            places = end_to_end(setting, epoch + 1)
            first, end = (n * size // setting.batch * setting.batch for n in (epoch, epoch + 1))
            share = (end - first) // setting.num_lanes
            for lane in range(setting.num_lanes):
                begin = first + lane * share
                part = places[begin : begin + share]
                lane_epoch = setting.order(lane).epoch(epoch)
                spans = lane_epoch.spans(range(lane_epoch.num_samples))
                if lane % 2:
                    spans.reverse()
                assert [(span.shard, i) for span in spans for i in span.samples] == part


def test_lanes_are_equally_long():
    for setting in SETTINGS:
        orders = [setting.order(lane) for lane in range(setting.num_lanes)]
        lengths = [[order.epoch(epoch).num_samples for epoch in range(5)] for order in orders]
        assert all(of_lane == lengths[0] for of_lane in lengths), setting
        assert all(number % setting.share == 0 for number in lengths[0])


def test_a_lane_reads_on_behind_its_part_then_before_it_then_behind_the_epoch():
    for number, setting in enumerate(SETTINGS):
        lane, epoch = number % setting.num_lanes, number % 3
        size = setting.everything().total()
        first, end = (n * size // setting.batch * setting.batch for n in (epoch, epoch + 1))
        share = (end - first) // setting.num_lanes
        begin = first + lane * share
        places = end_to_end(setting, epoch + 4)
        expected = places[begin + share : end] + places[first:begin] + places[end:]
        lane_epoch = setting.order(lane).epoch(epoch)
        assert lane_epoch.num_samples == share
        for start, count in ((0, 5), (3, 2), (end - first - share, 4), (end - first, size)):
            spans = lane_epoch.spans(range(share + start, share + start + count))
            found = [(span.shard, i) for span in spans for i in span.samples]
            assert found == expected[start : start + count], (setting, start)
        for position in (share, share + setting.shuffle_block + 1):
            block = lane_epoch.block(position)
            assert position in block and len(block) == setting.shuffle_block
            assert (block.start - share) % setting.shuffle_block == 0


@pytest.mark.parametrize("lane", range(5))
@pytest.mark.parametrize("source", [0, 2])
def test_an_epoch_of_few_samples_by_hand(lane, source):
    """11 samples for 5 lanes: two batches, of which the second epoch holds the eleventh."""
    sizes, seed = {1: 4, 4: 1, 5: 6}, 5
    places = []
    for number in range(2):
        words = [1, seed, number] if source == 0 else [4, source, 1, seed, number]
        shards = [list(sizes)[place] for place in np.random.default_rng(words).permutation(3)]
        places += [(shard, i) for shard in shards for i in range(sizes[shard])]
    order = open_order(sizes, lane, 5, seed, shuffle_block=1, source=source)
    for epoch in range(2):
        first = 10 * epoch + 2 * lane
        expected = places[first : first + 2]
        if lane % 2 and expected[0][0] != expected[1][0]:
            expected.reverse()
        assert sequence(order, epoch) == expected


def test_epochs_seeds_lanes_and_sources_differ():
    sizes = dict.fromkeys(range(12), 10)
    orders = {
        "first": sequence(open_order(sizes, 0, 2, 3, 8), 0),
        "epoch": sequence(open_order(sizes, 0, 2, 3, 8), 1),
        "seed": sequence(open_order(sizes, 0, 2, 4, 8), 0),
        "lane": sequence(open_order(sizes, 1, 2, 3, 8), 0),
        "source": sequence(open_order(sizes, 0, 2, 3, 8, source=1), 0),
    }
    assert len({tuple(order) for order in orders.values()}) == len(orders)


def test_each_block_of_each_lane_is_shuffled_by_itself():
    shuffles = set()
    for lane in range(2):
        lane_epoch = open_order({0: 40, 1: 40}, lane, 2, 0, shuffle_block=20).epoch(0)
        for start in (0, 20, 40):
            shuffles.add(tuple(lane_epoch.shuffled(lane_epoch.block(start))))
    assert len(shuffles) == 6
