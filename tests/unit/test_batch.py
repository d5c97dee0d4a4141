"""The stream of global batches: one for any ranks x workers, resumable, clear when it breaks."""

import os
import pickle
import random
import subprocess
import sys
import tarfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from aclip.config.geometry import patch_grid
from aclip.config.recipe import Recipe
from aclip.config.sections import TextTowerConfig
from aclip.data.batch import Batch, join
from aclip.data.images.augment import augment
from aclip.data.loader import LaneDataset, build_train_loader, count_lanes, describe_rests
from aclip.data.shards.listing import Shard
from aclip.data.tokenizer import build_tokenizer
from aclip.data.workers import run_ahead
from aclip.errors import ConfigError

BATCH = 16
NUM_SHARDS, SHARD_SIZE = 9, 7
PARTS = ["student_views", "teacher_view", "student_boxes", "teacher_box", "augment_params"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ACLIP_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def shards(write_tar, encode_image):
    """Nine shards of seven samples, nine of them unusable: five in shard 1, four in shard 2."""
    paths = []
    for shard in range(NUM_SHARDS):
        members = {}
        for index in range(SHARD_SIZE):
            seed = shard * SHARD_SIZE + index
            members[f"{shard}-{index}.jpg"] = encode_image(30 + index, 34, seed)
            members[f"{shard}-{index}.txt"] = b"word " * (1 + index)
        if shard == 1:
            members["1-0.jpg"] = members["1-0.jpg"][:300]
            members["1-1.txt"] = b" "
            members["1-2.jpg"] = encode_image(4000, 1)
            del members["1-3.txt"], members["1-4.jpg"]
        paths.append(write_tar(f"{shard}.tar", list(members.items())))
    with tarfile.open(paths[2]) as archive:
        cut = archive.getmember("2-3.jpg").offset_data + 100
    os.truncate(paths[2], cut)
    return [Shard(path, SHARD_SIZE) for path in paths]


def make_recipe(workers: int = 0, **sections) -> Recipe:
    values = {
        "model": {"image": {"resolution": 32, "kwargs": {"patch_size": 8}}},
        "teacher": {"resolution": 16},
        "data": {"workers": workers, "lanes": 8, "shuffle_block": 5},
        "train": {"global_batch_size": BATCH, "seed": 3},
    }
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section if section is not None else None
    return Recipe(**values)


def take(recipe: Recipe, shards, ranks: int, count: int, cursors=None) -> list[Batch]:
    """The next global batches, joined from the loaders of all ranks."""
    loaders = [
        iter(build_train_loader(recipe, shards, rank, ranks, cursors)) for rank in range(ranks)
    ]
    batches = [join([next(loader) for loader in loaders]) for _ in range(count)]
    for loader in loaders:
        loader.close()
    return batches


def assert_equal_batches(first: Batch, second: Batch) -> None:
    assert first.keys == second.keys and first.captions == second.captions
    for name in [*PARTS, "cursors"]:
        assert torch.equal(getattr(first, name), getattr(second, name)), name
    assert torch.equal(first.tokens.ids, second.tokens.ids)
    assert torch.equal(first.tokens.lengths, second.tokens.lengths)


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


def test_tensors_have_their_documented_shapes_and_types(shards):
    (batch,) = take(make_recipe(), shards, 1, 1)
    described = {
        name: (tuple(tensor.shape), tensor.dtype)
        for name in [*PARTS, "cursors"]
        if (tensor := getattr(batch, name)) is not None
    }
    assert described == {
        "student_views": ((16, 2, 3, 32, 32), torch.uint8),
        "teacher_view": ((16, 3, 16, 16), torch.uint8),
        "student_boxes": ((16, 2, 4), torch.int32),
        "teacher_box": ((16, 4), torch.int32),
        "augment_params": ((16, 2, 9), torch.float32),
        "cursors": ((8, 3), torch.int64),
    }
    assert batch.mask_noise is None and batch.tokens.ids.dtype == torch.int64


def test_keys_name_shard_and_sample(shards):
    (batch,) = take(make_recipe(), shards, 1, 1)
    for key in batch.keys:
        shard, sample = key.split("/")
        assert sample.startswith(f"{shard}-")


def test_tokens_end_with_the_longest_caption_of_the_batch(shards):
    for batch in take(make_recipe(2), shards, 1, 3):
        lengths = [2 + len(caption.split()) for caption in batch.captions]
        assert batch.tokens.ids.shape[1] == max(lengths)
        assert batch.tokens.lengths.tolist() == lengths
        assert torch.equal(
            batch.tokens.ids, build_tokenizer(TextTowerConfig()).encode(batch.captions).ids
        )


def test_the_random_policy_gets_uniform_noise_on_the_block_grid_and_no_teacher(shards):
    random = {"mask": {"policy": "random"}, "loss": {"byol": 0}, "teacher": None}
    batches = take(make_recipe(**random), shards, 1, 4)
    noise = torch.cat([batch.mask_noise for batch in batches])
    assert noise.shape == (64, 2, 2, 2) and noise.dtype == torch.float32
    assert noise.min() >= 0 and noise.max() < 1 and noise.unique().numel() > 500
    assert batches[0].teacher_view is None and batches[0].teacher_box is None
    with_teacher = take(make_recipe(), shards, 1, 4)
    for first, second in zip(batches, with_teacher, strict=True):
        assert torch.equal(first.student_views, second.student_views)


def test_the_patch_grid_comes_from_arguments_or_the_towers_name():
    def recipe(name, resolution, kwargs):
        image = {"name": name, "resolution": resolution, "kwargs": kwargs}
        return make_recipe(model={"image": image})

    assert patch_grid(recipe("vit_base_patch16_224", 224, {})) == 14
    assert patch_grid(recipe("vit_base_patch16_224", 224, {"patch_size": 32})) == 7
    with pytest.raises(ConfigError, match="patch_size"):
        patch_grid(recipe("vit_custom", 224, {}))


def test_micro_batches_are_consecutive_and_join_to_the_batch(shards):
    (batch,) = take(make_recipe(), shards, 1, 1)
    micros = batch.split(6)
    assert [len(micro) for micro in micros] == [6, 6, 4]
    assert [key for micro in micros for key in micro.keys] == batch.keys
    for name in PARTS:
        assert torch.equal(torch.cat([getattr(m, name) for m in micros]), getattr(batch, name))
    assert torch.equal(torch.cat([m.tokens.ids for m in micros]), batch.tokens.ids)
    assert torch.equal(torch.cat([m.tokens.lengths for m in micros]), batch.tokens.lengths)
    assert all(torch.equal(micro.cursors, batch.cursors) for micro in micros)
    counted = replace(batch, skipped={"no_image": 2}, repeated=2).split(6)
    assert [(micro.skipped, micro.repeated) for micro in counted] == [
        ({"no_image": 2}, 2),
        ({}, 0),
        ({}, 0),
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_workers_error_reaches_the_user_as_its_own_message(tmp_path, shards, workers):
    missing = [Shard(str(tmp_path / f"gone-{index}.tar"), 5) for index in range(8)]
    with pytest.raises(ConfigError, match=r"^shard \S*gone-\d\.tar can't be read: [^\n]*$"):
        take(make_recipe(workers), missing, 1, 1)


@pytest.mark.parametrize("workers", [0, 2])
def test_data_without_a_usable_sample_end_the_run_by_name(tmp_path, workers):
    bad = tmp_path / "bad.tar"
    bad.write_bytes(b"")
    with pytest.raises(ConfigError, match=r"nothing usable .*\(truncated_shard 60\).*bad\.tar;"):
        take(make_recipe(workers), [Shard(str(bad), 3)], 1, 3)


def test_a_shard_with_nothing_usable_is_named_in_the_main_process(tmp_path, shards, caplog):
    bad = tmp_path / "bad.tar"
    bad.write_bytes(b"")
    recipe = make_recipe(2, data={"lanes": 2}, train={"seed": 5})
    take(recipe, [*shards[3:], Shard(str(bad), 3)], 1, 8)
    assert [r.getMessage() for r in caplog.records] == [f"shard {bad} holds no usable sample"]


@pytest.fixture
def sources(shards):
    """The nine shards as two sources, the second of one shard for eight lanes."""
    return [replace(shard, source=int(index == 8)) for index, shard in enumerate(shards)]


def with_sources(workers: int, weights=(1, 3)) -> Recipe:
    sources = [{"shards": "unread", "weight": weight} for weight in weights]
    return make_recipe(workers, data={"sources": sources})


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
    # 56 samples, 4 a batch; and 7, 12 a batch.
    assert describe_rests(with_sources(0), sources) == [
        "data.sources.0: 56 samples come once in 14 batches",
        "data.sources.1: 7 samples, which come 1.7 times in a batch",
    ]
    (first, _) = describe_rests(with_sources(0, [5, 3]), sources)  # 10 a batch
    assert first == (
        "data.sources.0: 56 samples come once in 5 batches; the 6 left over begin the next pass"
    )


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


def test_loading_leaves_the_global_random_state_alone(shards):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    take(make_recipe(1), shards, 1, 1)
    assert torch.equal(torch.rand(3), expected)


def test_the_data_set_pickles_for_worker_processes_that_are_not_forked(shards):
    dataset = LaneDataset(make_recipe(), shards, 8, 0, np.zeros((8, 3), dtype=np.int64))
    copy = pickle.loads(pickle.dumps(dataset))
    assert_equal_batches(next(iter(dataset)).batch, next(iter(copy)).batch)


def test_a_signal_from_a_launcher_ends_no_worker(shards):
    loader = iter(build_train_loader(make_recipe(2), shards, 0, 1))
    next(loader)
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    for name in ("TERM", "INT", "USR1"):
        # From another process: SIGTERM from the main process is how it ends its workers.
        subprocess.run(["kill", f"-{name}", *children], check=True)
    time.sleep(0.2)
    for _ in range(6):
        next(loader)
    assert set(children) <= set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())
    loader.close()


SCRIPT = """
import os, pathlib, pickle, subprocess, sys
import torch
from aclip.data.loader import build_train_loader

def children(pid):
    return pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()

if __name__ == "__main__":
    recipe, shards = pickle.load(open(sys.argv[1], "rb"))
    if sys.argv[2] == "raise":
        loader = iter(build_train_loader(recipe, shards, 0, 1))
        next(loader)
        raise RuntimeError("training broke")
    torch.cuda.is_initialized = lambda: True
    loader = iter(build_train_loader(recipe, shards, 0, 1))
    next(loader)
    (forkserver,) = (child for child in children(os.getpid()) if children(child))
    workers = children(forkserver)
    for name in ("TERM", "INT", "USR1"):
        subprocess.run(["kill", f"-{name}", forkserver, *workers], check=True)
    for _ in range(6):
        next(loader)
    print(len(workers), "workers survived", flush=True)
    os.kill(os.getpid(), 9)
"""


def run_script(tmp_path, shards, end: str) -> subprocess.CompletedProcess:
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "arguments").write_bytes(pickle.dumps((make_recipe(2), shards)))
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "arguments"), end]
    # Workers share the pipes, so this returns only when the last of them has ended.
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_an_error_in_the_main_process_does_not_wait_for_workers(shards, tmp_path):
    done = run_script(tmp_path, shards, "raise")
    assert done.returncode == 1 and done.stderr.endswith("RuntimeError: training broke\n")


def test_workers_beside_cuda_outlive_signals_but_not_a_killed_main_process(shards, tmp_path):
    done = run_script(tmp_path, shards, "kill")
    assert done.returncode == -9 and done.stdout == "2 workers survived\n", done.stderr


def test_running_ahead_keeps_order_and_hands_on_the_end_as_an_error():
    def items():
        yield from range(5)
        raise ConfigError("stopped")

    found = []
    with pytest.raises(ConfigError, match="stopped"):
        for item in run_ahead(items(), device=None):
            found.append(item)
    assert found == [0, 1, 2, 3, 4]
    ahead = run_ahead(iter(range(100)), device=None)
    assert [next(ahead) for _ in range(50)] == list(range(50))
    ahead.close()
