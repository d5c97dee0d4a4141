"""The order of the lanes: complete, seeded, independent of bad samples, resumable anywhere."""

import os
from collections import Counter
from functools import partial

import numpy as np
import pytest

from aclip.data.lanes.order import LaneOrder, SourceOrder, Span, even_parts
from aclip.data.lanes.patience import Patience
from aclip.data.lanes.stream import LaneStream
from aclip.data.shards.listing import Shard, Skip
from aclip.errors import ConfigError

COUNTS = (5, 3, 8, 4, 7)


@pytest.fixture
def shards(write_tar):
    return [
        Shard(write_tar(f"{s}.tar", [(f"{s}-{i}.txt", b"x") for i in range(count)]), count)
        for s, count in enumerate(COUNTS)
    ]


def open_lane(shards, lane=0, num_lanes=2, block=4, cursor=(0, 0, 0), seed=0, bad=(), skips=False):
    """A lane that gives one sample to each batch."""

    def prepare(place, raw):
        return Skip("no_image") if raw.key in bad else (raw.key, place.epoch, place.position)

    sizes = {index: shard.num_samples for index, shard in enumerate(shards)}
    parts = partial(even_parts, sum(sizes.values()), num_lanes, num_lanes)
    order = LaneOrder(SourceOrder(sizes, seed, parts), lane, block)
    return LaneStream(shards, order, cursor, prepare, skips_unreadable=skips)


def test_every_sample_comes_first_once_an_epoch_at_most(shards):
    """What a pass leaves over comes beside that, and so does what stands in for a bad sample."""
    bad = {"0-1", "2-7", "4-3"}
    found = {}

    def prepare(place, raw):
        shard, index = map(int, raw.key.split("-"))
        assert (place.shard, place.index) == (shard, index)
        if raw.key in bad:
            return Skip("no_image")
        found.setdefault(place.epoch, []).append((raw.key, place.is_first))
        return raw.key

    sizes = {index: shard.num_samples for index, shard in enumerate(shards)}
    batch, lanes = 8, 4
    source = SourceOrder(sizes, 0, partial(even_parts, sum(sizes.values()), batch, lanes))
    for lane in range(lanes):
        # 27 samples in batches of 8: 27 batches are 8 epochs.
        LaneStream(shards, LaneOrder(source, lane, 4), (0, 0, 0), prepare).take(2 * 27)
    assert sorted(found) == list(range(8))
    for epoch, came in found.items():
        first = [key for key, is_first in came if is_first]
        left_over = (epoch + 1) * 27 % 8
        assert len(set(first)) == len(first) >= 27 - left_over - len(bad)
        assert len(came) > len(first)  # bad samples in each epoch


def places(seed, num_passes):
    """The keys of all samples as order.py documents their sequence: shards permuted, end to end."""
    return [
        f"{shard}-{index}"
        for number in range(num_passes)
        for shard in np.random.default_rng([1, seed, number]).permutation(len(COUNTS))
        for index in range(COUNTS[shard])
    ]


def by_formula(lane, num_lanes, block, seed, epoch):
    """An epoch of a lane as order.py documents it: its part of the sequence, blocks shuffled."""
    first, end = (number * sum(COUNTS) // num_lanes for number in (epoch, epoch + 1))
    begin = first * num_lanes + lane * (end - first)
    keys = places(seed, epoch + 1)[begin : begin + end - first]
    if lane % 2:  # shard by shard from the last to the first
        shards = dict.fromkeys(key.split("-")[0] for key in reversed(keys))
        keys = [key for shard in shards for key in keys if key.split("-")[0] == shard]
    samples = []
    for number, first in enumerate(range(0, len(keys), block)):
        part = keys[first : first + block]
        order = np.random.default_rng([2, seed, epoch, lane, number]).permutation(len(part))
        samples += [(part[place], epoch, first + i) for i, place in enumerate(order)]
    return samples


def keys_of_epoch(samples, epoch=0):
    return [key for key, its_epoch, _ in samples if its_epoch == epoch]


def test_every_sample_comes_once_in_an_epoch(shards):
    # 27 samples for two lanes: the last one of a pass begins the next epoch.
    for epoch in (0, 1):
        keys = [
            key
            for lane in range(2)
            for key in keys_of_epoch(open_lane(shards, lane).take(60), epoch)
        ]
        assert Counter(keys) == Counter(places(0, 2)[26 * epoch : 26 + 28 * epoch])


@pytest.mark.parametrize(("lane", "num_lanes", "block", "seed"), [(0, 2, 4, 0), (1, 3, 5, 7)])
def test_the_order_is_the_documented_one(shards, lane, num_lanes, block, seed):
    expected = [
        sample for epoch in range(3) for sample in by_formula(lane, num_lanes, block, seed, epoch)
    ]
    found = open_lane(shards, lane, num_lanes, block, seed=seed).take(len(expected))
    assert found == expected


@pytest.mark.parametrize(("num_lanes", "block"), [(1, 4), (3, 100), (8, 2)])
def test_a_stream_gives_the_samples_that_its_order_names(shards, num_lanes, block):
    for lane in range(num_lanes):
        stream = open_lane(shards, lane, num_lanes, block)
        for epoch in range(2):
            lane_epoch = stream.order.epoch(epoch)
            for position in range(lane_epoch.num_samples):
                shard, index = lane_epoch.sample_at(position)
                assert stream.take(1) == [(f"{shard}-{index}", epoch, position)]


@pytest.mark.parametrize("num_lanes", [6, 8, 40])
def test_more_lanes_than_shards_give_every_sample_once_a_pass(shards, num_lanes):
    streams = [open_lane(shards, lane, num_lanes) for lane in range(num_lanes)]
    by_epoch = {0: Counter(), 1: Counter(), 2: Counter()}
    while streams[0].epoch < 3:
        for stream in streams:
            ((key, epoch, _),) = stream.take(1)
            by_epoch.get(epoch, Counter())[key] += 1
        assert {stream.epoch for stream in streams} == {epoch}
    ends = [27 * epoch // num_lanes * num_lanes for epoch in range(4)]  # 27 samples
    assert by_epoch == {
        epoch: Counter(places(0, 3)[ends[epoch] : ends[epoch + 1]]) for epoch in range(3)
    }


def test_lanes_are_equally_long_and_take_other_samples_in_each_epoch(shards):
    sizes = [len(keys_of_epoch(open_lane(shards, lane, 8).take(9))) for lane in range(8)]
    assert sizes == [3, 3, 3, 3, 3, 3, 3, 3]  # 27 samples over 8 lanes, 3 for the next epoch
    firsts = {tuple(keys_of_epoch(open_lane(shards, 3, 8).take(60), epoch)) for epoch in range(6)}
    assert len(firsts) == 6


@pytest.mark.parametrize("num_lanes", [7, 40])
def test_a_stream_of_many_lanes_resumes_at_every_cursor(shards, num_lanes):
    bad = {"1-0", "1-1", "2-5", "4-6"}
    stream = open_lane(shards, 2, num_lanes, block=2, bad=bad)
    samples, cursors = [], []
    for _ in range(20):
        cursors.append(stream.cursor)
        samples += stream.take(1)
    for count in range(20):
        resumed = open_lane(shards, 2, num_lanes, block=2, cursor=cursors[count], bad=bad)
        assert resumed.take(20 - count) == samples[count:]


def test_a_lane_whose_few_samples_of_an_epoch_are_bad_goes_on_unless_all_are(shards):
    everything = {f"{s}-{i}" for s, count in enumerate(COUNTS) for i in range(count)}
    for lane in range(20):
        (sample,) = open_lane(shards, lane, 20, bad=everything - {"2-4"}).take(1)
        assert sample[0] == "2-4"
    with pytest.raises(ConfigError, match="nothing usable"):
        open_lane(shards, 0, 20, bad=everything).take(1)


def test_samples_beyond_the_index_are_counted_once_by_lanes_that_share_a_shard(shards):
    short = [Shard(shard.url, shard.num_samples - 1) for shard in shards]
    streams = [open_lane(short, lane, 11, block=2) for lane in range(11)]
    for stream in streams:
        stream.take(2)  # 22 samples over 11 lanes
    assert sum((stream.skipped for stream in streams), Counter()) == {"not_in_index": 5}


def test_an_unreadable_shard_ends_the_stream_or_is_skipped_and_named(shards):
    os.remove(shards[2].url)
    with pytest.raises(ConfigError, match=r"2\.tar can't be read"):
        open_lane(shards, num_lanes=1).take(27)
    whole = [s for s in by_formula(0, 1, 4, 0, 0) if not s[0].startswith("2-")]
    stream = open_lane(shards, num_lanes=1, skips=True)
    assert stream.take(19) == whole[:19]
    assert stream.skipped == {"unreadable_shard": 8}
    assert [warning for warning in stream.warnings if "can't be read" in warning] == [
        f"shard {shards[2].url} can't be read: No such file or directory; check the file; "
        "its samples are skipped"
    ]


@pytest.mark.parametrize("num_lanes", [1, 20])
def test_skipping_ends_where_nothing_can_be_read(shards, num_lanes):
    for shard in shards:
        os.remove(shard.url)
    with pytest.raises(ConfigError, match=r"9 shards in a row that can't be read, the last: shard"):
        open_lane(shards, num_lanes=num_lanes, skips=True).take(1)


def test_epochs_and_seeds_and_lanes_differ_in_order(shards):
    samples = open_lane(shards, num_lanes=1).take(54)
    first, second = keys_of_epoch(samples, 0), keys_of_epoch(samples, 1)
    other = keys_of_epoch(open_lane(shards, num_lanes=1, seed=1).take(27), 0)
    assert sorted(first) == sorted(second) == sorted(other)
    assert first != second and first != other


def test_samples_stay_in_their_block(shards):
    in_order = keys_of_epoch(open_lane(shards, num_lanes=1, block=1).take(27))
    shuffled = keys_of_epoch(open_lane(shards, num_lanes=1, block=4).take(27))
    assert shuffled != in_order
    for start in range(0, 27, 4):
        assert sorted(shuffled[start : start + 4]) == sorted(in_order[start : start + 4])


def test_bad_samples_shift_no_other_and_are_made_up_for_behind_the_part(shards):
    bad = {"0-1", "2-0", "2-7", "4-3"}
    everything = open_lane(shards).take(40)
    stream = open_lane(shards, bad=bad)
    good = stream.take(40)
    repeated = [sample for sample in good if sample[2] >= 13]  # of the 13 in an epoch's part
    assert [s for s in good if s not in repeated] == [s for s in everything if s[0] not in bad]
    # Of the other lane's samples in the same epoch, one for each of this lane's that is bad.
    for epoch in range(2):
        num_bad = sum(sample[0] in bad for sample in everything if sample[1] == epoch)
        others = keys_of_epoch(open_lane(shards, 1).take(40), epoch)
        extra = keys_of_epoch(repeated, epoch)
        assert len(extra) == num_bad and set(extra) <= set(others)
    assert stream.repeated == len(repeated) > 0
    stream.clear_reports()
    assert stream.repeated == 0


def test_lanes_end_an_epoch_together_whatever_is_bad(shards):
    bad = {f"2-{index}" for index in range(8)}  # a whole shard, that of one lane or two
    streams = [open_lane(shards, lane, 3, bad=bad) for lane in range(3)]
    for step in range(40):
        epochs = {sample[1] for stream in streams for sample in stream.take(1)}
        assert epochs == {step // 9}  # 27 samples are 9 batches


def test_skipped_samples_are_counted_by_kind(shards):
    stream = open_lane(shards, num_lanes=1, bad={"0-1", "2-0"})
    stream.take(25)
    assert stream.skipped == {"no_image": 2}


@pytest.mark.parametrize("block", [1, 4, 100])
def test_a_stream_resumes_at_every_cursor(shards, block):
    bad = {"1-0", "1-1", "1-2", "2-5", "4-6"}
    stream = open_lane(shards, num_lanes=1, block=block, bad=bad)
    samples, cursors = [], []
    for _ in range(50):
        cursors.append(stream.cursor)
        samples += stream.take(1)
    for count in range(0, 50, 3):
        resumed = open_lane(shards, num_lanes=1, block=block, cursor=cursors[count], bad=bad)
        assert resumed.take(50 - count) == samples[count:]


def test_resuming_opens_no_shard_before_the_cursor(shards):
    expected = open_lane(shards, num_lanes=1, block=2).take(27)
    first_shard = int(expected[0][0].split("-")[0])
    os.remove(shards[first_shard].url)  # holds 8 samples at most
    resumed = open_lane(shards, num_lanes=1, block=2, cursor=(0, 10, 10)).take(17)
    assert resumed == expected[10:]


def test_samples_beyond_the_index_are_counted_and_shift_nothing(shards):
    short = [Shard(shard.url, shard.num_samples - 1) for shard in shards]
    stream = open_lane(short, num_lanes=1, block=4)
    keys = keys_of_epoch(stream.take(22))
    assert len(set(keys)) == 22 and not {"0-4", "1-2", "2-7", "3-3", "4-6"} & set(keys)
    assert stream.skipped == {"not_in_index": 5}


def test_a_shard_with_nothing_usable_is_reported_once_an_epoch(shards):
    stream = open_lane(shards, num_lanes=1, bad={f"1-{i}" for i in range(3)})
    stream.take(24)
    assert stream.warnings == [f"shard {shards[1].url} holds no usable sample"]


@pytest.mark.parametrize("cursor", [(0, 0, 0), (0, 3, 2)])
def test_a_lane_with_nothing_usable_ends_with_its_shards_names(shards, cursor):
    everything = {f"{s}-{i}" for s, count in enumerate(COUNTS) for i in range(count)}
    stream = open_lane(shards, lane=1, cursor=cursor, bad=everything)
    with pytest.raises(ConfigError) as error:
        stream.take(1)
    assert "data lane 1" in str(error.value) and "(no_image 540)" in str(error.value)
    assert sum(shard.url in str(error.value) for shard in shards) == len(shards)


def test_of_many_shards_with_nothing_usable_a_few_are_named():
    patience = Patience([Shard(f"{index}.tar", 1) for index in range(2000)], 3, [1] * 2000)
    patience.start_epoch([])
    with pytest.raises(
        ConfigError, match="in 1000 samples .* 0.tar, .* 8.tar and 991 more; repair"
    ):
        for index in range(2000):
            patience.count(index, Skip("no_image"))
    assert index == 999


def test_a_part_of_a_shard_with_nothing_usable_is_reported_unless_it_is_small():
    patience = Patience([Shard("0.tar", 100), Shard("1.tar", 100)], 3, [100, 100])
    patience.start_epoch([Span(0, range(91, 100)), Span(1, range(10))])
    for index in range(19):
        patience.count(int(index >= 9), Skip("no_image"))
    assert patience.warnings == [
        "shard 1.tar holds no usable sample among the 10 that data lane 3 took of it"
    ]


def test_a_rest_of_an_epoch_that_holds_nothing_usable_is_made_up_for(shards):
    last = {key for key, _, _ in open_lane(shards, num_lanes=1).take(27)[24:]}
    stream = open_lane(shards, num_lanes=1, cursor=(0, 24, 24), bad=last)
    samples = stream.take(4)
    assert [epoch for _, epoch, _ in samples] == [0, 0, 0, 1] and stream.repeated == 3
