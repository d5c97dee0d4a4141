"""Signals between two steps."""

import os
import signal

import torch

from aclip.training.step_watch import StepWatch


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
