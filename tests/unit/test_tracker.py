"""Weights & Biases: offline the numbers arrive under one id, and bad set-ups are said."""

import importlib.util
import json
import struct

import numpy as np
import pytest

from aclip.errors import ConfigError
from aclip.run_folder.metrics_file import EvaluationLine, StepLine
from aclip.training.metrics.metrics_logger import MetricsLogger
from aclip.training.metrics.wandb_tracker import WandbTracker, check_wandb

wandb = pytest.importorskip("wandb")


@pytest.fixture(autouse=True)
def of_nobody(tmp_path, monkeypatch):
    """No key, and settings that are read anew."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb.teardown()
    yield
    wandb.teardown()


def read_records(path):
    """The records of an offline run's file: LevelDB's log format after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, position, parts = path.read_bytes(), 7, b""
    while position + 7 <= len(content):
        if 32768 - position % 32768 < 7:  # the rest of a block
            position += 32768 - position % 32768
        _, length, kind = struct.unpack_from("<IHB", content, position)
        parts += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(parts)
            parts = b""


def read_run(run_folder):
    """Ids of the runs, oldest first, and the logged lines of all."""
    ids, lines = [], []
    for path in sorted(run_folder.glob("wandb/offline-run-*/*.wandb")):
        for record in read_records(path):
            if record.HasField("run"):
                ids.append(record.run.run_id)
            if record.HasField("history"):
                items = {"/".join(i.nested_key) or i.key: i for i in record.history.item}
                lines.append({key: json.loads(item.value_json) for key, item in items.items()})
    return ids, lines


def test_offline_every_number_arrives_and_a_resumed_run_keeps_its_id(tmp_path):
    tracker = WandbTracker("project", tmp_path, "", {"optimizer": {"lr": 0.5}})
    first_id = tracker.id
    logger = MetricsLogger(tmp_path, 1000, 50, tracker=tracker)
    logger.log(StepLine(200, 2, {"loss": 1.5}, memory_gib=2.0, skipped={"no_image": 4}))
    logger.log_kept_patches(np.zeros((4, 6, 3), dtype=np.uint8), 200)
    logger.close()

    tracker = WandbTracker("project", tmp_path, first_id, {})
    assert tracker.id == first_id
    logger = MetricsLogger(tmp_path, 1000, 50, 100, tracker)
    # Before what was seen already.
    logger.log_evaluation(EvaluationLine(150, "teacher", {"zero_shot_top1": 0.25}))
    logger.close()

    wandb.teardown()  # its process may still be writing the second run's file
    ids, lines = read_run(tmp_path)
    assert set(ids) == {first_id}
    numbers, picture, evaluation = lines
    expected = {"terms/loss": 1.5, "train/step": 2, "train/skipped/no_image": 4}
    assert {**expected, "train/memory_gib": 2.0, "samples": 200}.items() <= numbers.items()
    assert "train/momentum" not in numbers
    assert picture["samples"] == 200 and picture["kept_patches/width"] == 6
    assert {"teacher/zero_shot_top1": 0.25, "samples": 150}.items() <= evaluation.items()


def test_a_missing_package_is_said_before_the_run_on_every_rank(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for is_writer in (True, False):
        with pytest.raises(ConfigError, match=r"train.wandb is project, .*\.\[wandb\]"):
            check_wandb("project", is_writer)
    check_wandb("", True)


def test_without_a_key_only_an_offline_run_starts(monkeypatch):
    check_wandb("project", True)
    monkeypatch.setenv("WANDB_MODE", "online")
    wandb.teardown()
    with pytest.raises(ConfigError, match="train.wandb is project, .*wandb login"):
        check_wandb("project", True)
    check_wandb("project", False)  # the other ranks send nothing
