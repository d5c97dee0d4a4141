"""The helper itself: results in rank order, failures with traceback, nothing left running."""

import os
import subprocess
import time

import pytest
import torch
import torch.distributed as dist
from processes import still_running

pytestmark = pytest.mark.distributed


def test_ranks_communicate_and_results_come_in_rank_order(run_distributed):
    def add_up(offset):
        total = torch.tensor(float(dist.get_rank() + offset))
        dist.all_reduce(total)
        return dist.get_rank(), total, torch.get_num_threads(), os.environ["WORLD_SIZE"]

    results = run_distributed(add_up, 3, 10)
    assert [rank for rank, *_ in results] == [0, 1, 2]
    assert [total.item() for _, total, *_ in results] == [33.0, 33.0, 33.0]  # 10 + 11 + 12
    assert all(rest == [1, "3"] for _, _, *rest in results)


def test_failure_of_one_rank_is_raised_with_its_traceback(run_distributed):
    def fail_on_rank_1():
        if dist.get_rank() == 1:
            raise KeyError("lost")
        dist.barrier()

    with pytest.raises(KeyError, match="lost") as caught:
        run_distributed(fail_on_rank_1, 2)
    assert "rank 1" in str(caught.value.__cause__)
    assert "fail_on_rank_1" in str(caught.value.__cause__)


def test_rank_that_disappears_is_reported(run_distributed):
    def vanish_on_rank_0():
        if dist.get_rank() == 0:
            os._exit(7)
        time.sleep(60)

    with pytest.raises(RuntimeError, match="rank 0 ended without a result, exit code 7"):
        run_distributed(vanish_on_rank_0, 2)


def test_timeout_kills_ranks_and_their_children(run_distributed, tmp_path):
    def hang():
        child = subprocess.Popen(["sleep", "60"])
        (tmp_path / str(dist.get_rank())).write_text(str(child.pid))
        time.sleep(60)

    with pytest.raises(TimeoutError, match="0, 1") as caught:
        run_distributed(hang, 2, timeout=5)
    assert str(caught.value).count("in hang") == 2  # where each stood
    for path in tmp_path.iterdir():
        assert not still_running([int(path.read_text())], 5)
    assert len(list(tmp_path.iterdir())) == 2
