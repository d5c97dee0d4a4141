"""The stream of global batches: one for any ranks x workers, and resumable."""

import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from shard_batches import (
    BATCH,
    NUM_SHARDS,
    SHARD_SIZE,
    assert_equal_batches,
    make_recipe,
    take,
    with_sources,
    write_shards,
)

from aclip.config.recipe import Recipe
from aclip.data.batch import Batch
from aclip.data.dealing import count_lanes, describe_rests
from aclip.data.images.augment import augment
from aclip.data.loader import build_train_loader
from aclip.data.shards.listing import Shard
from aclip.errors import ConfigError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ACLIP_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def shards(write_tar, encode_image):
    return write_shards(write_tar, encode_image)


def augmented(batch: Batch, recipe: Recipe, ranks: int = 1) -> torch.Tensor:
    """The pixels that the student sees, coloured rank by rank."""
    views, params = batch.student_views.flatten(0, 1), batch.augment_params.flatten(0, 1)
    parts = zip(views.chunk(ranks), params.chunk(ranks), strict=True)
    return torch.cat([augment(*part, recipe.augment, torch.float32) for part in parts])


@pytest.mark.parametrize(("ranks", "workers"), [(1, 2), (2, 1), (2, 2), (4, 1), (8, 0)])
def test_the_global_batches_are_the_same_for_any_ranks_and_workers(shards, ranks, workers):
    expected = take(make_recipe(0), shards, 1, 6)
    found = take(make_recipe(workers), shards, ranks, 6)
    for first, second in zip(expected, found, strict=True):
        assert len(first) == BATCH
        assert_equal_batches(first, second)
        assert first.skipped == second.skipped and first.repeated == second.repeated
        pixels = augmented(first, make_recipe()), augmented(second, make_recipe(), ranks)
        assert torch.equal(*pixels)


@pytest.mark.parametrize(("stop", "ranks", "workers"), [(1, 4, 1), (3, 1, 2), (5, 8, 0)])
def test_a_run_continues_at_the_next_sample_on_other_ranks_and_workers(
    shards, stop, ranks, workers
):
    expected = take(make_recipe(0), shards, 2, 8)
    found = take(make_recipe(workers), shards, ranks, 8 - stop, expected[stop - 1].cursors)
    for first, second in zip(expected[stop:], found, strict=True):
        assert_equal_batches(first, second)


@pytest.mark.parametrize(
    ("kind", "points"), [("one source", 20), ("two sources", 5), ("more lanes than shards", 5)]
)
def test_a_run_continues_exactly_at_random_points(shards, sources, kind, points):
    make, data = {
        "one source": (make_recipe, shards),
        "two sources": (with_sources, sources),
        "more lanes than shards": (make_recipe, shards[3:6]),
    }[kind]
    rng = random.Random(kind)
    expected = take(make(0), data, 2, 42)
    for _ in range(points):
        stop = rng.randrange(1, 40)
        # Workers are processes, each of which takes a while to start.
        ranks, workers = rng.choice([(1, 0), (2, 0), (4, 0), (8, 0)] * 3 + [(1, 2), (2, 1)])
        found = take(make(workers), data, ranks, 2, expected[stop - 1].cursors)
        for first, second in zip(expected[stop : stop + 2], found, strict=True):
            assert_equal_batches(first, second)


def test_every_good_sample_comes_once_an_epoch_and_every_bad_one_is_counted(shards):
    recipe = make_recipe(data={"lanes": 1}, train={"global_batch_size": 9})
    loader = iter(build_train_loader(recipe, shards, 0, 1))
    num_samples = NUM_SHARDS * SHARD_SIZE
    num_good = num_samples - 9
    keys, skipped, repeated = [], Counter(), 0
    while len(keys) < 2 * num_samples:
        batch = next(loader)
        keys += batch.keys
        skipped.update(batch.skipped)
        repeated += batch.repeated
    good = [keys[epoch * num_samples :][:num_good] for epoch in range(2)]
    for epoch in range(2):
        assert len(set(good[epoch])) == num_good
    assert set(good[0]) == set(good[1]) == set(keys)
    # As many as are bad come again, to let the lane keep step with the others.
    assert repeated == 2 * 9
    # Where the lane reads on, it meets some of the bad ones again.
    assert {kind: count // 2 for kind, count in skipped.items()} == {
        "unreadable_image": 1,
        "empty_caption": 1,
        "image_too_small": 1,
        "no_caption": 1,
        "no_image": 1,
        "truncated_shard": 4,
    }


@pytest.fixture
def sources(shards):
    """The nine shards as two sources, the second of one shard for eight lanes."""
    return [replace(shard, source=int(index == 8)) for index, shard in enumerate(shards)]


@pytest.mark.parametrize(("ranks", "workers"), [(1, 2), (2, 2), (4, 0)])
def test_weighted_sources_are_the_same_for_any_ranks_and_workers(sources, ranks, workers):
    expected = take(with_sources(0), sources, 1, 6)
    found = take(with_sources(workers), sources, ranks, 6)
    for first, second in zip(expected, found, strict=True):
        assert_equal_batches(first, second)
        # Weights 1 : 3 of 16 samples.
        assert sum(key.startswith("8/") for key in first.keys) == 12


def test_weighted_sources_continue_at_the_next_sample_on_other_ranks(sources):
    expected = take(with_sources(0), sources, 2, 6)
    assert expected[0].cursors.shape == (8, 7)
    found = take(with_sources(1), sources, 4, 3, expected[2].cursors)
    for first, second in zip(expected[3:], found, strict=True):
        assert_equal_batches(first, second)


def test_one_source_is_the_same_as_no_sources(shards):
    for first, second in zip(
        take(with_sources(0, [7]), shards, 1, 3), take(make_recipe(), shards, 1, 3), strict=True
    ):
        assert_equal_batches(first, second)


def test_cursors_of_other_sources_are_refused(sources):
    cursors = torch.zeros(8, 3, dtype=torch.int64)
    with pytest.raises(ConfigError, match="cursors of 1 sources, but data.sources gives 2"):
        build_train_loader(with_sources(0), sources, 0, 1, cursors)


def test_what_an_epoch_leaves_to_the_next_is_said(sources, shards):
    assert describe_rests(make_recipe(), shards) == [
        "an epoch of 63 samples is 3 batches of 16; the 15 left over begin the next epoch"
    ]
    assert describe_rests(make_recipe(), [Shard("x.tar", 32)]) == [
        "an epoch of 32 samples is 2 batches of 16"
    ]
    for number, words in ((5, "5 samples are"), (1, "1 sample is")):
        assert describe_rests(make_recipe(), [Shard("x.tar", number)]) == [
            f"{words} less than a batch of 16, in which each comes {16 / number:.1f} times on "
            "average"
        ]
    # 56 samples, 4 a batch; and 7, 12 a batch.
    assert describe_rests(with_sources(0), sources) == [
        "data.sources.0: 56 samples come once in 14 batches",
        "data.sources.1: 7 samples, which come 1.7 times in a batch",
    ]
    (first, _) = describe_rests(with_sources(0, [5, 3]), sources)  # 10 a batch
    assert first == (
        "data.sources.0: 56 samples come once in 5 batches; the 6 left over begin the next pass"
    )


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("number", [300, 17, 5, 1])
def test_one_shard_of_any_size_serves_all_ranks(write_tar, encode_image, ranks, number):
    members = []
    for index in range(number):
        members += [(f"{index}.png", encode_image(20, 20, index, "PNG")), (f"{index}.txt", b"x")]
    shards = [Shard(write_tar("x.tar", members), number)]
    keys = [key for batch in take(make_recipe(), shards, ranks, count=3) for key in batch.keys]
    assert len(keys) == 3 * BATCH
    passes = Counter(keys).values()
    assert max(passes) <= -(-3 * BATCH // number) and len(passes) == min(number, 3 * BATCH)


def test_lanes_depend_on_the_batch_alone(sources, shards):
    def lanes(**train):
        return count_lanes(make_recipe(data={"lanes": None}, train=train))

    assert lanes() == BATCH and lanes(global_batch_size=6 * 768) == 768
    assert count_lanes(make_recipe()) == count_lanes(with_sources(0)) == 8
    for data in (shards, shards[:1]):
        recipe = make_recipe(data={"lanes": None})
        assert build_train_loader(recipe, data, 0, 1).num_lanes == BATCH


@pytest.mark.parametrize(("ranks", "workers"), [(2, 2), (8, 0)])
def test_lanes_that_share_shards_are_the_same_for_any_ranks_and_workers(shards, ranks, workers):
    expected = take(make_recipe(0), shards[3:6], 1, 4)
    found = take(make_recipe(workers), shards[3:6], ranks, 4)
    for first, second in zip(expected, found, strict=True):
        assert_equal_batches(first, second)


def test_cursors_of_another_number_of_lanes_are_refused(shards):
    with pytest.raises(ConfigError, match="4 data lanes, but the recipe gives 8"):
        build_train_loader(make_recipe(), shards, 0, 1, torch.zeros(4, 3, dtype=torch.int64))
