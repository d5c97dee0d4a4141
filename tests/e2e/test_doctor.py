"""doctor.py finds what would break a run, one line a fault, on two nodes behind a remote shell.

The remote shell here starts its command on this machine, in a folder's environment for each node:
`sitecustomize.py`, other packages, another home. What is planted there is real to the node.
"""

import argparse
import os
import socket
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from aclip.nodes import doctor
from aclip.nodes.hostfile import Host

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).parents[2]
REMOTE_SHELL = """#!/bin/sh
# Called as ssh is: with the node, then the command.
node=$1; shift
test -d "{folder}/$node" || {{ echo "ssh: connect to host $node: No route to host" >&2; exit 255; }}
export PYTHONPATH="{folder}/$node" HOME="{folder}/$node"
exec "$@"
"""


class Nodes:
    """Two nodes, a and b, with nothing wrong, and doctor.py on them."""

    def __init__(self, folder: Path):
        self.folder = folder
        for name in ("a", "b"):
            (folder / name / "data").mkdir(parents=True)
            with tarfile.open(folder / name / "data" / "0.tar", "w"):
                pass
        self.hostfile = folder / "hostfile"
        self.hostfile.write_text("a slots=1\nb slots=1\n")
        shell = folder / "rsh"
        shell.write_text(REMOTE_SHELL.format(folder=folder))
        shell.chmod(0o755)
        self.output = folder / "run"
        self.port = _free_port()

    def plant(self, node: str, code: str) -> None:
        """Runs code at the start of every Python on a node."""
        (self.folder / node / "sitecustomize.py").write_text(code)

    def examine(self, train="~/data/*.tar", timeout=180) -> tuple[int, list[str], str]:
        """Exit status, the lines with problems, and the whole output."""
        command = [sys.executable, str(ROOT / "launch/doctor.py"), "--rsh", f"{self.folder}/rsh"]
        command += ["--master_addr", "127.0.0.1", "--master_port", str(self.port)]
        command += [str(self.hostfile), "--recipe", "demo", "--train", train]
        finished = subprocess.run(
            [*command, "--output", str(self.output)],
            cwd=self.folder,
            env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        lines = finished.stdout.splitlines()
        problems = [line for line in lines if line.startswith("problem: ")]
        return finished.returncode, problems, finished.stdout + finished.stderr


@pytest.fixture
def nodes(tmp_path):
    return Nodes(tmp_path)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _assert_one(nodes: Nodes, *words: str, **options) -> None:
    status, problems, output = nodes.examine(**options)
    assert status == 2, output
    assert len(problems) == 1, output
    for word in words:
        assert word in problems[0]
    assert "not ready" in output
    assert "Traceback" not in output


def test_nodes_without_a_fault_are_ready(nodes):
    status, problems, output = nodes.examine()
    assert (status, problems) == (0, []), output
    assert "all-reduce over 2 ranks: 64 MiB in " in output
    assert "GB/s" in output
    assert output.splitlines()[-1] == "ready"
    assert list(nodes.output.iterdir()) == [], "the doctor's own files are gone"


def test_finds_a_wrong_version(nodes):
    installed = nodes.folder / "b" / "deepspeed-0.17.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: deepspeed\nVersion: 0.17.0\n")
    _assert_one(nodes, "problem: b: has deepspeed 0.17.0, but a has", "install the same")


def test_finds_a_host_that_is_not_reachable(nodes):
    nodes.hostfile.write_text("a slots=1\nb slots=1\nc slots=1\n")
    _assert_one(nodes, "problem: c: not reachable (ssh: connect to host c", "check that")


def test_finds_a_run_folder_that_can_not_be_written(nodes):
    (nodes.folder / "file").write_text("in the way")
    nodes.output = nodes.folder / "file" / "run"
    nodes.hostfile.write_text("a slots=1\n")
    _assert_one(nodes, "problem: a: the run folder", "can't be written", "--output")


def test_finds_a_run_folder_that_is_not_shared(nodes):
    nodes.plant(
        "b",
        "import os, pathlib\n"
        "_touch, _listdir = pathlib.Path.touch, os.listdir\n"
        "mine = []\n"
        "def touch(path, *a, **k): mine.append(path.name); _touch(path, *a, **k)\n"
        "pathlib.Path.touch = touch\n"
        "os.listdir = lambda *a: [n for n in _listdir(*a) if n[:8] != '.doctor-' or n in mine]\n",
    )
    _assert_one(nodes, "problem: b: does not see what a writes", "all nodes share")


def test_finds_missing_shards(nodes):
    (nodes.folder / "b" / "data" / "0.tar").unlink()
    _assert_one(nodes, "problem: b: ", "data.train", f"{nodes.folder}/b/data/*.tar")


def test_finds_a_remote_shard_that_is_not_there(nodes):
    address = f"file://{nodes.folder}/a/data/0.tar"
    nodes.hostfile.write_text("a slots=1\n")
    _assert_one(
        nodes, "problem: a: shard file://", "there is no such file", train=f"{address}.gone"
    )


def test_finds_a_clock_that_is_off(nodes):
    nodes.plant("b", "import time\n_time = time.time\ntime.time = lambda: _time() + 100\n")
    _assert_one(nodes, "problem: b: its clock is +100.0 s off", "synchronise")


def test_finds_a_full_disk(nodes):
    nodes.output.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(nodes.output)]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no small file system can be mounted: {mounted.stderr.strip()}")
    try:
        nodes.hostfile.write_text("a slots=1\n")
        _assert_one(nodes, "problem: a: the run folder", "0.00 GiB left; free 5 GiB")
    finally:
        subprocess.run(["umount", str(nodes.output)], check=True)


def test_finds_an_occupied_port(nodes):
    with socket.create_server(("127.0.0.1", nodes.port)):
        _assert_one(nodes, f"problem: a: port {nodes.port} is in use", "--master_port")


@pytest.mark.parametrize(
    "hostfile, words",
    [
        pytest.param("a slots=1\nb slots=1\na slots=1\n", ["line 3", "second time"], id="twice"),
        pytest.param("a slots=1\nb slots=0\n", ["line 2", "b slots=0"], id="zero slots"),
        pytest.param("a slots=1\nb slots:1\n", ["line 2", "'b slots:1'"], id="malformed line"),
    ],
)
def test_finds_a_mistake_in_the_hostfile(nodes, hostfile, words):
    nodes.hostfile.write_text(hostfile)
    _assert_one(nodes, *words)


def test_node_that_never_answers_is_named(nodes, monkeypatch, capsys):
    code = "import sys, time\nif 'aclip.nodes.probe' in sys.orig_argv: time.sleep(600)\n"
    nodes.plant("b", code)
    monkeypatch.setattr(doctor, "ANSWER_SECONDS", 30.0)  # node a waits 10 s for b
    monkeypatch.chdir(nodes.folder)
    options = argparse.Namespace(
        rsh=f"{nodes.folder}/rsh", master_addr="127.0.0.1", master_port=nodes.port
    )
    assert not doctor.examine([Host("a", 1), Host("b", 1)], [], options)
    problems = [line for line in capsys.readouterr().out.splitlines() if "problem: " in line]
    assert len(problems) == 1
    assert problems[0].startswith("problem: b: no answer in 30 s")


def test_argument_that_pretraining_does_not_know_is_one_sentence(nodes):
    command = [
        sys.executable,
        str(ROOT / "launch/doctor.py"),
        str(nodes.hostfile),
        "--recipes",
        "x",
    ]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert finished.returncode == 2
    assert "error: --recipes is not an argument of pretrain.py" in finished.stderr
