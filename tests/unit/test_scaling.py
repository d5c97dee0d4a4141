"""What a scaling measurement counts, on events made by hand."""

from dataclasses import dataclass

import pytest

from aclip.benchmarks.scaling import Measured, first_slots, format_table, rank_counts
from aclip.benchmarks.scaling_rank import PROFILED, communication_share
from aclip.nodes.hostfile import Host


@dataclass
class Event:
    """As the profiler gives it."""

    text: str
    start: int
    duration: int = 0

    def name(self):
        return self.text

    def start_ns(self):
        return self.start

    def duration_ns(self):
        return self.duration


@pytest.mark.parametrize(
    "total, counts", [(1, [1]), (2, [1, 2]), (4, [1, 2, 4]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])]
)
def test_powers_of_two_and_all_slots_are_measured(total, counts):
    assert rank_counts(total) == counts


def test_slots_are_taken_host_by_host():
    hosts = [Host("a", 2), Host("b", 4)]
    assert first_slots(hosts, 1) == [Host("a", 1)]
    assert first_slots(hosts, 4) == [Host("a", 2), Host("b", 2)]
    assert first_slots(hosts, 6) == hosts


def test_share_of_collectives_counts_overlaps_once_and_only_in_the_step():
    events = [
        Event(PROFILED, 1000, 1000),
        Event("gloo:all_reduce", 500, 600),  # 100 inside
        Event("gloo:all_reduce", 1200, 200),
        Event("ncclDevKernel_AllReduce", 1300, 200),  # 100 more
        Event("aten::mm", 1600, 300),
        Event("gloo:barrier", 1950, 500),  # 50 inside
    ]
    assert communication_share(events) == pytest.approx(0.45)


def test_table_shows_how_far_the_plan_is_off():
    text = format_table([Measured("weak", 2, 8, 12.5, 0.9, 0.25, 100.0, 104.0)])
    for cell in ("weak", "12.5", "90%", "25%", "100.0", "104.0", "+4.0%"):
        assert cell in text
