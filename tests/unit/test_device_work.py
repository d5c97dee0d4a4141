"""What the cost table says of a GPU: from a made-up profile, and from the prediction."""

import json
from dataclasses import dataclass

import pytest
import torch
from small_recipe import SMALL_RECIPE

from aclip.benchmarks.device_work import DeviceWork, OnGpu, Predicted, predict_steps, work_of
from aclip.benchmarks.step_cost import ON_GPU, System, format_table, make_row
from aclip.config.ds_config import read_ds_config
from aclip.config.recipe_file import load_recipe
from aclip.planning.gpus import DEVICE_NAMES, GPUS, gpu_of_device

SMALL = [
    "model.image.resolution=32",
    "model.image.kwargs={patch_size: 8, embed_dim: 64, depth: 2, num_heads: 2}",
    "model.text={width: 32, heads: 2, layers: 2, context_length: 77}",
    "model.embed_dim=16",
    "teacher.resolution=32",
    "train.global_batch_size=8",
]


@dataclass
class Event:
    """As the profiler gives it."""

    kind: str
    start: int
    duration: int

    def activity_type(self):
        return self.kind

    def start_ns(self):
        return self.start

    def duration_ns(self):
        return self.duration


def test_launches_are_counted_and_time_in_which_several_run_counts_once():
    events = [
        Event("kernel", 1000, 300),
        Event("kernel", 1200, 200),  # 100 of it beside the first
        Event("gpu_memcpy", 1250, 50),  # beside both
        Event("gpu_memset", 1900, 100),
        Event("gpu_user_annotation", 0, 5000),
        Event("cpu_op", 0, 5000),
        Event("cuda_runtime", 0, 5000),
    ]
    assert work_of(reversed(events)) == DeviceWork(4, pytest.approx(500e-9))
    assert work_of(events[4:]) is None


def system(name, seconds, **options):
    return System(name, lambda: None, 0, None, seconds=[seconds] * 3, **options)


def test_table_sets_what_was_measured_beside_what_was_predicted():
    work = DeviceWork(2500, 0.15)
    ours = system("clip_vitb16", 0.2, work=work, predicted=Predicted(1829, 0.16))
    theirs = system("open_clip, patch dropout 0.5", 0.3, work=work)
    rows = [make_row(each, [ours, theirs], ["clip_vitb16"], 512) for each in (ours, theirs)]
    assert rows[0].on_gpu == OnGpu(2500, pytest.approx(0.75), Predicted(1829, 0.16))
    lines = [line.split() for line in format_table(rows, ["clip_vitb16"], {}).splitlines()]
    assert ["clip_vitb16", "2,500", "1,829", "75%", "200.0", "160.0", "1.25"] in lines
    assert ["open_clip,", "patch", "dropout", "0.5", "2,500", "50%", "300.0"] in lines


def test_table_says_so_where_nothing_is_predicted_and_of_a_cpu_it_says_nothing():
    on_gpu, on_cpu = system("a", 0.2, work=DeviceWork(1, 0.1)), system("a", 0.2)
    text = format_table([make_row(on_gpu, [on_gpu], ["a"], 8)], ["a"], {})
    assert "predicted: nothing" in text
    assert "launches" not in format_table([make_row(on_cpu, [on_cpu], ["a"], 8)], ["a"], {})


def test_every_system_of_a_known_gpu_is_predicted(tmp_path, monkeypatch):
    (tmp_path / "ds.json").write_text(json.dumps(ON_GPU))
    ds_config = read_ds_config(str(tmp_path / "ds.json"), 8, 1)
    recipes, device = {"demo": load_recipe(SMALL_RECIPE, SMALL)}, torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    predicted = predict_steps(recipes, ds_config, True, device)
    assert list(predicted) == ["demo", "open_clip"]
    assert all(each.launches > 100 and each.seconds > 0 for each in predicted.values())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200 NVL")
    assert predict_steps(recipes, ds_config, True, device) == {}


def test_names_of_devices_are_those_of_the_boards_in_the_list():
    assert gpu_of_device("NVIDIA H100 80GB HBM3") is GPUS["h100"]
    assert gpu_of_device("NVIDIA H100 PCIe") is None
    assert sorted(DEVICE_NAMES.values()) == sorted(GPUS)
