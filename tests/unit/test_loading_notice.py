"""One line of a run says how fast data come and how fast the steps are, and what to set."""

from types import SimpleNamespace

import pytest
import torch
from shard_batches import make_recipe, write_shards

from aclip.data.loader import build_train_loader
from aclip.training.metrics import loading_notice
from aclip.training.metrics.loading_notice import LoadingNotice
from aclip.training.metrics.step_timer import StepTimer


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture(autouse=True)
def two_ranks(monkeypatch):
    monkeypatch.setattr(loading_notice, "world_size", lambda: 2)


def lines(capsys, wait=0.0, steps=60, device="cuda", **loader):
    """What is printed in steps of 100 images and 0.1 s of work each, after one that is slow."""
    facts = {"images_per_second": 300.0, "num_workers": 4, "advised_workers": 4, "crops": "device"}
    clock = Clock()
    timer = StepTimer(clock=clock)
    notice = LoadingNotice(SimpleNamespace(**facts | loader), timer, torch.device(device))
    for step in range(steps):
        with timer.waiting():
            clock.now += 1000.0 if step == 0 else wait
        clock.now += 0.1
        timer.step(100)
        notice.after_step()
    return capsys.readouterr().out.splitlines()


RATES = (
    "loading: 4 workers a rank can make 600 images/s in all, "
    "the steps alone can take 1,000 images/s"
)


def test_a_run_says_once_what_workers_make_and_steps_take(capsys):
    assert lines(capsys) == [RATES]
    assert lines(capsys, wait=0.02) == [RATES]  # a sixth of the time
    assert lines(capsys, steps=50) == []
    assert lines(capsys, images_per_second=None) == []
    assert lines(capsys, wait=0.1, num_workers=0, device="cpu") == []
    (line,) = lines(capsys, num_workers=0, advised_workers=0)
    assert line.startswith("loading: no workers can make 600 images/s in all, ")


@pytest.mark.parametrize(
    ("facts", "advice"),
    [
        ({"num_workers": 4, "advised_workers": 8, "crops": "worker"}, "data.workers=8 (now 4)"),
        ({"crops": "worker"}, "data.crops=device, with --allow_changes"),
        ({"crops": "worker", "device": "cpu"}, "store smaller images (launch/convert.py"),
        ({}, "give each rank more cores"),
    ],
)
def test_much_waiting_names_the_key_to_set(capsys, facts, advice):
    (line,) = lines(capsys, wait=0.1, **facts)
    assert line.startswith(f"{RATES}; they waited for data for 50 % of the time: ")
    assert advice in line


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_knows_how_fast_its_workers_are(
    workers, write_tar, encode_image, tmp_path, monkeypatch
):
    monkeypatch.setenv("ACLIP_CACHE", str(tmp_path / "cache"))
    shards = write_shards(write_tar, encode_image)
    loader = build_train_loader(make_recipe(workers), shards, 0, 1)
    batches = iter(loader)
    next(batches)
    assert loader.images_per_second is None
    batch = next(batches)
    # Of 2 ms for an image that a worker makes: its part takes 1 / workers of the batch.
    images = len(batch) / max(1, workers)
    assert [made[0] for made in loader._made] == [images] * max(1, workers)
    loader._made = [(images, 0.002 * images)] * max(1, workers)
    assert loader.images_per_second == pytest.approx(500 * max(1, workers))
    batches.close()


def test_a_loader_measures_what_a_part_took(write_tar, encode_image, tmp_path, monkeypatch):
    monkeypatch.setenv("ACLIP_CACHE", str(tmp_path / "cache"))
    loader = build_train_loader(make_recipe(), write_shards(write_tar, encode_image), 0, 1)
    ticks = iter(range(1000))
    clock = SimpleNamespace(perf_counter=lambda: float(next(ticks)))
    monkeypatch.setattr("aclip.data.loader.time", clock)
    batches = iter(loader)
    sizes = [len(next(batches)) for _ in range(3)]
    assert loader.images_per_second == sizes[1]  # one tick a part
    batches.close()
