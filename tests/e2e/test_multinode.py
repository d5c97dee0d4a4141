"""multinode.sh on this machine alone: what is refused, and how it stops."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import descendants, still_running

from aclip.run_folder import checkpoint_folder
from aclip.training.take_folder import find_beginning

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).parents[2]


def start(folder, launcher, *words: str, hosts="localhost slots=1\n") -> subprocess.Popen:
    (folder / "hostfile").write_text(hosts)
    return subprocess.Popen(
        [str(ROOT / "launch/multinode.sh"), *words],
        cwd=folder,
        env=launcher.env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def test_sigterm_even_twice_checkpoints_on_every_node_and_leaves_nothing(
    launcher, small_run, tmp_path
):
    run = tmp_path / "run"
    words = ["--ds_config", str(ROOT / "ds_configs/zero0.json"), "--output", str(run), *small_run]
    words += ["--resume", "none"]
    process = start(tmp_path, launcher, "hostfile", *words, "train.epochs=10000")
    try:
        while not (run / "metrics.jsonl").exists():
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.1)
        started = descendants(process.pid)
        os.kill(process.pid, signal.SIGTERM)
        time.sleep(1.0)  # while the first is acted upon: a second one changes nothing
        if process.poll() is None:
            os.kill(process.pid, signal.SIGTERM)
        output, _ = process.communicate(timeout=200)
    finally:
        process.kill()
    assert process.returncode == 143, output
    assert "[supervisor] stopped; the same command continues" in output
    latest = (run / "checkpoints" / "latest").read_text()
    state = json.loads((run / "checkpoints" / latest / "state.json").read_text())
    assert state["step"] > 0
    assert find_beginning(run, "none").checkpoint == str(run / "checkpoints" / latest)
    assert checkpoint_folder.verify(run / "checkpoints" / latest) is None
    assert not still_running(started, 5)
    assert "stopped by SIGTERM" in (run / "logs" / "node-0-localhost.log").read_text()


@pytest.mark.parametrize(
    "words, hosts, sentence",
    [
        pytest.param(["hostfile"], "a slots=x\n", "line 1 of hostfile", id="hostfile"),
        pytest.param(
            ["hostfile"], "localhost slots=1\nb slots=1\n", "names localhost beside", id="localhost"
        ),
        pytest.param(
            ["--backoff", "-1", "hostfile"], "a slots=1\n", "--backoff is -1", id="option"
        ),
        pytest.param(["none"], "a slots=1\n", "hostfile is none", id="no hostfile"),
        pytest.param(
            ["hostfile", "--ds_config", "x", "--outptu", "y"],
            "a slots=1\n",
            "--outptu is not an argument",
            id="argument of pretrain.py",
        ),
        pytest.param(
            ["--rsh", "none-such", "hostfile", "--ds_config", "x"],
            "a slots=1\n",
            "none-such, which is not installed",
            id="remote shell",
        ),
    ],
)
def test_bad_input_is_one_sentence(launcher, tmp_path, words, hosts, sentence):
    output, _ = (process := start(tmp_path, launcher, *words, hosts=hosts)).communicate(timeout=60)
    assert process.returncode == 2
    errors = [line for line in output.splitlines() if "error: " in line]
    assert len(errors) == 1 and sentence in errors[0], output
    assert "Traceback" not in output


def test_help_names_every_option():
    command = [str(ROOT / "launch/multinode.sh"), "--help"]
    environment = {**os.environ, "PYTHON": sys.executable}
    text = subprocess.run(command, env=environment, capture_output=True, text=True).stdout
    for option in ("--max_restarts", "--backoff", "--lost_after", "--master_port", "--rsh"):
        assert option in text
