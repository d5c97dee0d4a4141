"""Starts the launch scripts as a user would, through the DeepSpeed launcher."""

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@dataclass
class Finished:
    status: int
    output: str
    seconds: float


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Launcher:
    """Runs `deepspeed --num_accelerators N launch/pretrain.py` with a cache of its own, or without
    the launcher, when the script is its own single rank; or another script."""

    def __init__(self, cache: Path):
        self.env = {
            **os.environ,
            "ACLIP_CACHE": str(cache),
            "OMP_NUM_THREADS": "1",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }

    def start(
        self,
        *arguments: str,
        ranks: int = 2,
        launcher: bool = True,
        script: str = "pretrain.py",
    ) -> subprocess.Popen:
        command = [sys.executable]
        if launcher:
            command = ["deepspeed", "--num_accelerators", str(ranks), "--master_port"]
            command.append(str(_free_port()))
        command += [f"launch/{script}", *arguments]
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, *arguments: str, timeout: float = 240, **options) -> Finished:
        start = time.monotonic()
        process = self.start(*arguments, **options)
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            kill(process)
            output, _ = process.communicate()
            pytest.fail(f"still running after {timeout} s:\n{output}")
        return Finished(process.returncode, output, time.monotonic() - start)


def kill(process: subprocess.Popen) -> None:
    """SIGKILL to the launcher and every rank: no handler runs, nothing is flushed."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="session")
def launcher(tmp_path_factory) -> Launcher:
    return Launcher(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def kill_all():
    return kill
