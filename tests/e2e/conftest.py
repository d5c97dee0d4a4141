"""Starts the launch scripts as a user would, through the DeepSpeed launcher."""

import io
import os
import signal
import socket
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

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
    the launcher, whose start takes most of a short run: then the ranks are started as it would."""

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
        if launcher:
            command = ["deepspeed", "--num_accelerators", str(ranks), "--master_port"]
            return self._start([*command, str(_free_port()), f"launch/{script}", *arguments])
        return self._start([sys.executable, f"launch/{script}", *arguments])

    def run(
        self,
        *arguments: str,
        ranks: int = 2,
        launcher: bool = True,
        script: str = "pretrain.py",
        timeout: float = 240,
    ) -> Finished:
        start = time.monotonic()
        if launcher or ranks == 1:
            options = {"ranks": ranks, "launcher": launcher, "script": script}
            processes = [self.start(*arguments, **options)]
        else:
            processes = self._start_ranks(arguments, ranks)
        outputs = []
        try:
            for process in processes:
                outputs.append(process.communicate(timeout=start + timeout - time.monotonic())[0])
        except subprocess.TimeoutExpired:
            for process in processes:
                kill(process)
            rest = [process.communicate()[0] for process in processes[len(outputs) :]]
            pytest.fail(f"still running after {timeout} s:\n{''.join(outputs + rest)}")
        # Of several ranks, zero if any of them ended with zero.
        status = min((process.returncode for process in processes), key=bool)
        return Finished(status, "".join(outputs), time.monotonic() - start)

    def _start_ranks(self, arguments: tuple[str, ...], ranks: int) -> list[subprocess.Popen]:
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        common |= {"WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks)}
        return [
            self._start(
                [sys.executable, "launch/pretrain.py", f"--local_rank={rank}", *arguments],
                {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(ranks)
        ]

    def _start(self, command: list[str], env: dict[str, str] | None = None) -> subprocess.Popen:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env={**self.env, **(env or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )


def kill(process: subprocess.Popen) -> None:
    """SIGKILL to the launcher and every rank: no handler runs, nothing is flushed."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="session")
def launcher(tmp_path_factory) -> Launcher:
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # of all workers, so that the demo data is written once
    return Launcher(folder / "cache")


@pytest.fixture
def kill_all():
    return kill


@pytest.fixture(scope="session")
def small_run(tmp_path_factory) -> list[str]:
    """Arguments of a run of tiny towers on its own 96 samples, two epochs of six steps; each step
    is logged, and nothing is evaluated."""
    folder = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)
    for shard in range(4):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for index in range(24):
                pixels = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
                buffer = io.BytesIO()
                Image.fromarray(pixels).resize((48, 40)).save(buffer, "JPEG")
                caption = f"a photo of {'thing ' * int(rng.integers(1, 6))}{shard} {index}"
                for suffix, content in (("jpg", buffer.getvalue()), ("txt", caption.encode())):
                    info = tarfile.TarInfo(f"{index:03d}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return [
        *("--recipe", "demo", "--train", f"{folder}/{{0..3}}.tar"),
        *("train.global_batch_size=16", "train.epochs=2", "train.log_every=1"),
        *("train.evaluate_every=0", "train.warmup_epochs=1"),
        *("model.image.resolution=32", "teacher.resolution=32", "mask.block_size=1"),
        "model.image.kwargs={patch_size: 8, embed_dim: 24, depth: 2, num_heads: 2}",
        "model.text={width: 16, heads: 2, layers: 1, context_length: 16}",
        *("model.embed_dim=12", "data.lanes=4"),
    ]
