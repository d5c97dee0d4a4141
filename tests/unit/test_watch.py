"""What is watched from step to step: signals, losses, whether the GPU waits for the host."""

import os
import signal

import pytest
import torch
from small_recipe import SMALL_RECIPE

from aclip.config.recipe_file import load_recipe
from aclip.training.metrics.host_bound import HostBound
from aclip.training.step_watch import NonFiniteLoss, StepWatch, WatchedStep


def test_two_signals_in_one_step_are_both_heard():
    watch = StepWatch()
    with watch.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR1)
        watch.put(1, {"loss": torch.tensor(1.0)}, ["a"])
        watch.settle()
        assert watch.take_signals() == {signal.SIGTERM, signal.SIGUSR1}
        watch.put(2, {"loss": torch.tensor(1.0)}, ["a"])
        watch.settle()
        assert watch.take_signals() == set()


def test_a_step_is_read_once_with_its_terms_and_counts():
    watch = StepWatch()
    assert watch.settle() is None
    watch.put(3, {"loss": torch.tensor(1.5), "byol": torch.tensor(0.5)}, ["a"], [0, 7, 2])
    assert watch.settle() == WatchedStep(3, {"loss": 1.5, "byol": 0.5}, [0, 7, 2])
    assert watch.settle() is None
    watch.put(4, {"loss": torch.tensor(float("nan"))}, ["shard/key"], [0, 0, 0])
    with pytest.raises(NonFiniteLoss, match=r"step 4 is not finite \(loss nan\).*: shard/key$"):
        watch.settle()


class StandInEvent:
    """A CUDA event that has happened, or will when the host waits for it."""

    def __init__(self, has_happened):
        self.has_happened = has_happened

    def query(self):
        return self.has_happened

    def synchronize(self):
        self.has_happened = True


@pytest.mark.parametrize("ended", [True, False])
def test_a_step_that_the_device_has_ended_is_ready(ended):
    watch = StepWatch()
    watch.put(1, {"loss": torch.ones(())}, ["a"])
    watch._copied = StandInEvent(ended)
    assert watch.settle().terms == {"loss": 1.0}
    assert watch.was_ready is ended
    assert watch.settle() is None and watch.was_ready is None


def look_at(looks, capsys, data_wait_percent=1.0, compiled=False, zero_stage=2):
    overrides = ["train.global_batch_size=64", f"model.compile={str(compiled).lower()}"]
    host_bound = HostBound(load_recipe(SMALL_RECIPE, overrides), zero_stage)
    for was_ready in looks:
        host_bound.look(was_ready, data_wait_percent)
    return capsys.readouterr().out


def test_a_host_bound_run_says_so_once(capsys):
    text = look_at([False] * 5 + [True] * 18 + [False] * 2 + [True] * 50, capsys)
    assert text.count("host-bound") == 1
    assert "18 of 20 steps" in text and "64 images a GPU" in text and "model.compile" in text
    for changes in ({"compiled": True}, {"zero_stage": 3}):  # it is on, or refused
        text = look_at([True] * 30, capsys, **changes)
        assert "20 of 20 steps" in text and "model.compile" not in text


@pytest.mark.parametrize(
    "looks, data_wait_percent",
    [
        ([True] * 5 + [False] * 3 + [True] * 17, 1.0),  # the device is ahead, but for its start
        ([True] * 40, 20.0),  # it waits for data
        ([None] * 40, 1.0),  # there is none
        ([True] * 24, 1.0),  # too few steps to say
    ],
)
def test_no_other_run_is_called_host_bound(looks, data_wait_percent, capsys):
    assert look_at(looks, capsys, data_wait_percent) == ""
