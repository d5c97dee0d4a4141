"""A data worker that never answers ends a run on every rank, under the launcher, with its name."""

import re
import signal
import time

import pytest
from processes import children, descendants, ranks, signal_all, still_running

pytestmark = pytest.mark.e2e


def test_stalled_data_worker_ends_the_run_on_every_rank(launcher, small_run, tmp_path):
    words = ["--ds_config", "ds_configs/zero0.json", "--output", str(tmp_path), *small_run]
    words += ["train.epochs=10000", "data.workers=1", "train.hang_timeout=5"]
    process = launcher.start(*words)
    metrics = tmp_path / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 3:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    started = descendants(process.pid)
    (rank,) = ranks(process.pid, local_rank=1)
    signal_all(children(rank), signal.SIGSTOP)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    stalled = re.search(r"stalled: (rank \d) .*: step (\d+), loading data", output)
    assert stalled and stalled[1] == "rank 1", output
    assert int(stalled[2]) >= 3
    assert re.search(r"\[rank 1\] data worker, process \d+:\n(.*\n)+.*File", output), output
    assert not still_running(started, 5)
