"""How many lanes a batch has, and how many workers a rank reads its lanes with."""

import pytest

from aclip.data.lanes.counts import resolve_lanes, resolve_workers
from aclip.errors import ConfigError


@pytest.mark.parametrize(
    ("lanes", "batch", "expected"),
    [
        pytest.param(None, 128, 128, id="the batch"),
        pytest.param(None, 4096, 1024, id="at most 1024"),
        pytest.param(None, 4608, 768, id="6 x 8 ranks of 16 lanes"),
        pytest.param(None, 2062, 2, id="largest divisor below"),  # 2 x 1031
        pytest.param(None, 1, 1, id="one"),
        pytest.param(6, 12, 6, id="as given"),
        pytest.param(4096, 4096, 4096, id="as given, more than by default"),
    ],
)
def test_lanes_divide_the_batch(lanes, batch, expected):
    assert resolve_lanes(lanes, batch) == expected


def test_lanes_that_do_not_divide_the_batch_are_refused():
    with pytest.raises(ConfigError, match="data.lanes is 5, which does not divide"):
        resolve_lanes(5, 64)


@pytest.mark.parametrize(
    ("workers", "lanes", "ranks", "cores", "expected"),
    [
        pytest.param(None, 64, 2, 64, 16, id="up to 16"),
        pytest.param(None, 1024, 8, 12, 8, id="12 cores a rank"),
        pytest.param(None, 12, 2, 5, 3, id="a divisor of a rank's lanes"),
        pytest.param(None, 48, 1, 2, 2, id="as many as cores"),
        pytest.param(None, 4, 4, 16, 1, id="one lane a rank"),
        pytest.param(None, 4, 1, 0, 1, id="less than a core"),
        pytest.param(0, 4, 4, 2, 0, id="0 counts as 1"),
        pytest.param(2, 4, 2, 1, 2, id="as given"),
    ],
)
def test_ranks_and_workers_divide_the_lanes(workers, lanes, ranks, cores, expected):
    assert resolve_workers(workers, lanes, ranks, cores) == expected


def test_ranks_that_do_not_divide_the_lanes_are_refused_with_the_nearest_that_do():
    with pytest.raises(ConfigError, match="3 ranks do not divide the 8 data lanes; run on 2 or 4 "):
        resolve_workers(None, 8, 3, 2)


def test_workers_that_do_not_divide_the_lanes_are_refused_with_the_nearest_that_do():
    with pytest.raises(ConfigError, match="data.workers is 5, .* set data.workers to 4 or 6,"):
        resolve_workers(5, 24, 2, 8)
