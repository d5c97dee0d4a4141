"""What the measurement of checkpoints makes of its times, and bad input."""

import argparse

import pytest

from aclip.benchmarks.saving import Saves, benchmark_saving, format_table
from aclip.errors import ConfigError


def test_share_of_the_pause_leaves_the_first_save_out():
    saves = Saves(
        num_ranks=2,
        stage=3,
        size=3 * 2**20,
        pauses=[0.5, 0.1, 0.2, 0.3],
        cpu=[0.4, 0.1, 0.1, 0.1],
        writes=[1.0, 2.0, 2.0, 2.0],
        copies=[0.05],
    )
    assert saves.share == pytest.approx(0.1)
    row = format_table([saves]).splitlines()[-1].split()
    assert row == ["2", "3", "3", "0.200", "0.100", "2.000", "10.0%", "50.0%", "0.050"]


@pytest.mark.parametrize("saving, rounds, named", [([1, 0], 3, "is 0 or"), ([1], 0, "rounds is 0")])
def test_numbers_below_one_are_refused(saving, rounds, named):
    with pytest.raises(ConfigError, match=named):
        benchmark_saving(argparse.Namespace(saving=saving, rounds=rounds))
