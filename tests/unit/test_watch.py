"""Signals between two steps."""

import os
import signal

import pytest
import torch

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
