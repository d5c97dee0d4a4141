"""Learning rate and EMA momentum at samples whose value is plain to see."""

import math

import pytest

from aclip.method.schedules import ema_momentum, learning_rate

# 100 samples of warm-up from 0.1 to 0.5, then 800 of cosine down to 0.02.
SCHEDULE = {"total": 900, "warmup": 100, "start": 0.1, "peak": 0.5, "final": 0.02}


@pytest.mark.parametrize(
    "samples, expected",
    [
        (0, 0.1),
        (25, 0.2),  # a quarter of the way from 0.1 to 0.5
        (50, 0.3),
        (100, 0.5),
        (300, 0.02 + 0.48 * (2 + math.sqrt(2)) / 4),  # cos(pi/4): (1 + sqrt(1/2)) / 2
        (500, 0.26),  # half-way: the mean of peak and final
        (700, 0.02 + 0.48 * (2 - math.sqrt(2)) / 4),
        (900, 0.02),
        (5000, 0.02),  # behind the end it stays
    ],
)
def test_learning_rate_warms_up_linearly_then_follows_a_cosine(samples, expected):
    assert learning_rate(samples, **SCHEDULE) == pytest.approx(expected, rel=1e-12)


def test_learning_rate_without_warm_up_starts_at_the_peak():
    schedule = SCHEDULE | {"warmup": 0}
    assert learning_rate(0, **schedule) == 0.5
    assert learning_rate(450, **schedule) == pytest.approx(0.26)


def test_learning_rate_of_a_run_that_ends_inside_its_warm_up():
    schedule = SCHEDULE | {"total": 50}
    assert learning_rate(50, **schedule) == pytest.approx(0.3)


def test_learning_rate_has_no_jump_at_the_end_of_the_warm_up():
    before, after = learning_rate(99, **SCHEDULE), learning_rate(101, **SCHEDULE)
    assert before == pytest.approx(0.5, abs=0.005)
    assert after == pytest.approx(0.5, abs=1e-5)


@pytest.mark.parametrize(
    "schedule, samples, expected",
    [
        ({"schedule": "linear"}, 50, 0.3),
        ({"schedule": "linear"}, 100, 0.5),
        ({"schedule": "linear"}, 300, 0.38),  # a quarter of the way from 0.5 to 0.02
        ({"schedule": "linear"}, 900, 0.02),
        ({"schedule": "linear"}, 950, 0.02),
        ({"schedule": "constant"}, 50, 0.3),
        ({"schedule": "constant"}, 101, 0.5),
        ({"schedule": "constant"}, 900, 0.5),
        # The last fifth of 900 samples begins at 720 and is half over at 810.
        ({"schedule": "constant", "cooldown": 0.2}, 719, 0.5),
        ({"schedule": "constant", "cooldown": 0.2}, 720, 0.5),
        ({"schedule": "constant", "cooldown": 0.2}, 810, 0.26),
        ({"schedule": "constant", "cooldown": 0.2}, 900, 0.02),
        # A quarter of it over: half of the way down.
        ({"schedule": "constant", "cooldown": 0.2, "cooldown_shape": "1-sqrt"}, 720, 0.5),
        ({"schedule": "constant", "cooldown": 0.2, "cooldown_shape": "1-sqrt"}, 765, 0.26),
        ({"schedule": "constant", "cooldown": 0.2, "cooldown_shape": "1-sqrt"}, 900, 0.02),
        ({"schedule": "constant", "cooldown": 1.0}, 450, 0.26),
        ({"schedule": "cosine"}, 500, 0.26),
    ],
)
def test_other_schedules(schedule, samples, expected):
    assert learning_rate(samples, **SCHEDULE, **schedule) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    "samples, expected",
    [
        (0, 0.996),
        (250, 1 - 0.004 * (2 + math.sqrt(2)) / 4),
        (500, 0.998),
        (750, 1 - 0.004 * (2 - math.sqrt(2)) / 4),
        (1000, 1.0),
        (2000, 1.0),
    ],
)
def test_momentum_rises_from_its_start_to_one_on_a_cosine(samples, expected):
    assert ema_momentum(samples, total=1000, start=0.996) == pytest.approx(expected, rel=1e-12)


def test_momentum_of_one_stays_one():
    assert ema_momentum(3, total=10, start=1.0) == 1.0
