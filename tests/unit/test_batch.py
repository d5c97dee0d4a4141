"""What a batch holds; workers that fail, and workers that are signalled."""

import os
import pickle
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from shard_batches import PARTS, assert_equal_batches, make_recipe, take, write_shards

from aclip.config.geometry import patch_grid
from aclip.config.sections import TextTowerConfig
from aclip.data.loader import LaneDataset, build_train_loader
from aclip.data.shards.listing import Shard
from aclip.data.tokenizer import build_tokenizer
from aclip.data.workers import run_ahead
from aclip.errors import ConfigError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ACLIP_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def shards(write_tar, encode_image):
    return write_shards(write_tar, encode_image)


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
        columns = batch.tokens.ids.shape[1]
        assert columns % 8 == 0 and columns - 8 < max(lengths) <= columns
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
        for item in run_ahead(items()):
            found.append(item)
    assert found == [0, 1, 2, 3, 4]
    ahead = run_ahead(iter(range(100)))
    assert [next(ahead) for _ in range(50)] == list(range(50))
    ahead.close()
