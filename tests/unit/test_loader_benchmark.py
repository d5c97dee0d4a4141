"""The loader benchmark: its arithmetic by hand, its inputs, and one small run."""

import argparse
import json

import pytest

from aclip.benchmarks import loading
from aclip.benchmarks.loading import (
    EXACT,
    ON_DEVICE,
    OPEN_CLIP,
    PLAIN,
    Pipeline,
    data_waits,
    format_table,
    make_rows,
)
from aclip.errors import ConfigError


def test_rows_are_medians_and_medians_of_ratios():
    seconds = {EXACT: [2, 4, 4], ON_DEVICE: [1, 1, 1], OPEN_CLIP: [2, 2, 3], PLAIN: [10, 8, 6]}
    pipelines = [Pipeline(name, iter(()), rounds) for name, rounds in seconds.items()]
    rows = {row.name: row for row in make_rows(pipelines, 100, 1000)}
    exact = rows[EXACT]
    assert exact.images_per_second == 25 and exact.milliseconds == 40 and exact.cores == 40
    assert exact.to_open_clip == 0.75  # of 1, 0.5 and 0.75
    assert exact.to_plain == 2  # of 5, 2 and 1.5
    assert rows[OPEN_CLIP].to_open_clip == 1 and rows[ON_DEVICE].to_open_clip == 2
    table = format_table(list(rows.values()), 1000, {"shards": "some"})
    assert "cores a GPU at 1,000 img/s" in table and "shards some" in table
    assert len(table.splitlines()) == 6


def test_data_waits_come_from_the_log_lines_of_a_run(tmp_path):
    lines = [
        {"samples": 1, "step": 1, "terms": {}, "data_wait_percent": 4.0},
        {"samples": 1, "evaluation": "student", "metrics": {}},
        {"samples": 2, "step": 2, "terms": {}, "data_wait_percent": None},
        {"samples": 3, "step": 3, "terms": {}, "data_wait_percent": 2.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert data_waits(tmp_path) == data_waits(tmp_path / "metrics.jsonl") == [4, 2]


@pytest.mark.parametrize("content", [None, "{", '{"samples": 1, "step": 1, "terms": {}}\n'])
def test_a_run_without_readable_metrics_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(ConfigError, match=f"--run is {tmp_path}, which has no readable"):
        data_waits(tmp_path)


def arguments(**changes) -> argparse.Namespace:
    values = {"rounds": 1, "images": 16, "gpu_rate": 100.0, "shards": None, "set": []}
    return argparse.Namespace(**{**values, "run": None, "json": None, **changes})


@pytest.mark.parametrize("name", ["rounds", "images", "gpu_rate"])
def test_numbers_that_can_not_be_are_refused_by_name(name):
    with pytest.raises(ConfigError, match=f"--{name} is 0"):
        loading.benchmark_loading(arguments(**{name: 0}))


def test_all_loaders_read_the_same_shards_and_are_timed(
    tmp_path, monkeypatch, capsys, write_tar, encode_image
):
    monkeypatch.setenv("ACLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(loading, "BATCH_SIZE", 8)
    for shard in range(2):
        members = []
        for index in range(6):
            members.append((f"{shard}-{index}.jpg", encode_image(40, 50, index)))
            members.append((f"{shard}-{index}.txt", b"some words"))
        write_tar(f"{shard}.tar", members)
    small = ["model.image.resolution=32", "teacher.resolution=32"]
    path = tmp_path / "figures.json"
    changes = {"shards": f"{tmp_path}/[01].tar", "set": small, "json": str(path)}
    assert loading.benchmark_loading(arguments(**changes)) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [row["name"] for row in rows] == [EXACT, ON_DEVICE, OPEN_CLIP, PLAIN]
    assert all(row["images_per_second"] > 0 for row in rows)
    assert "img/s/core" in capsys.readouterr().out


def test_generated_pictures_weigh_what_a_photo_does(tmp_path):
    import numpy as np

    sizes = [len(loading._picture(np.random.default_rng(seed))) for seed in range(3)]
    assert all(69_000 < size < 77_000 for size in sizes)
