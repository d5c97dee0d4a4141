"""Starts the launch scripts as a user would, through the DeepSpeed launcher."""

import io
import json
import os
import signal
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_recipe import SMALL_RECIPE

from aclip.data import demo

TRAIN_SCENES, VAL_SCENES = 3200, 480
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
    the launcher, whose start takes most of a short run: then the ranks are forked from a process
    that has imported what they need (fork_server.py), in the environment that it would give them.
    """

    def __init__(self, folder: Path, cache: Path):
        self.folder = folder
        self.env = {
            **os.environ,
            "ACLIP_CACHE": str(cache),
            "OMP_NUM_THREADS": "1",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }
        self._fork_server = self._answers = None

    def start(
        self, *arguments: str, ranks: int = 2, script: str = "pretrain.py"
    ) -> subprocess.Popen:
        command = ["deepspeed", "--num_accelerators", str(ranks), "--master_port"]
        return subprocess.Popen(
            [*command, str(_free_port()), f"launch/{script}", *arguments],
            cwd=ROOT,
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(
        self,
        *arguments: str,
        ranks: int = 2,
        launcher: bool = True,
        script: str = "pretrain.py",
        timeout: float = 240,
    ) -> Finished:
        start = time.monotonic()
        if not launcher:
            status, output = self._run_forked([f"launch/{script}", *arguments], ranks, timeout)
            return Finished(status, output, time.monotonic() - start)
        process = self.start(*arguments, ranks=ranks, script=script)
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            kill(process)
            pytest.fail(f"still running after {timeout} s:\n{process.communicate()[0]}")
        return Finished(process.returncode, output, time.monotonic() - start)

    def _run_forked(self, arguments: list[str], ranks: int, timeout: float) -> tuple[int, str]:
        """The status, of several ranks zero if any of them ended with zero, and all output."""
        if self._fork_server is None:
            answers, write_end = os.pipe()
            self._answers = os.fdopen(answers)
            self._fork_server = subprocess.Popen(
                [sys.executable, Path(__file__).with_name("fork_server.py"), str(write_end)],
                cwd=ROOT,
                env=self.env,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                pass_fds=[write_end],
                text=True,
            )
            os.close(write_end)
        master = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        request = {"arguments": arguments, "timeout": timeout, "ranks": []}
        outputs = [self.folder / f"{rank}.log" for rank in range(ranks)]
        for rank, path in enumerate(outputs):
            env = dict(self.env)
            if ranks > 1:
                env |= {**master, "WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks)}
                env |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            request["ranks"].append({"output": str(path), "env": env})
        self._fork_server.stdin.write(json.dumps(request) + "\n")
        self._fork_server.stdin.flush()
        statuses = json.loads(self._answers.readline())
        output = "".join(path.read_text() for path in outputs)
        if statuses is None:
            pytest.fail(f"still running after {timeout} s:\n{output}")
        return min(statuses, key=bool), output

    def close(self) -> None:
        if self._fork_server is not None:
            self._fork_server.communicate()
            self._answers.close()


def kill(process: subprocess.Popen) -> None:
    """SIGKILL to the launcher and every rank: no handler runs, nothing is flushed."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _write_few_scenes(cache: Path) -> None:
    """The built-in data under their own name, but fewer of them: all would take a minute."""
    with pytest.MonkeyPatch.context() as patch:
        name = demo._folder_name()
        patch.setattr(demo, "_folder_name", lambda: name)
        patch.setattr(demo, "TRAIN_SHARD_SIZE", TRAIN_SCENES // demo.TRAIN_SHARDS)
        patch.setattr(demo, "VAL_SIZE", VAL_SCENES)
        patch.setenv("ACLIP_CACHE", str(cache))
        demo.ensure_demo_data()


@pytest.fixture(scope="session")
def launcher(tmp_path_factory) -> Iterator[Launcher]:
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # of all workers, so that the demo data is written once
    _write_few_scenes(folder / "cache")
    launcher = Launcher(tmp_path_factory.mktemp("launcher"), folder / "cache")
    yield launcher
    launcher.close()


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
        "--recipe",
        SMALL_RECIPE,
        "--train",
        f"{folder}/{{0..3}}.tar",
        "train.global_batch_size=16",
        "train.epochs=2",
        "train.log_every=1",
        "train.evaluate_every=0",
        "train.warmup_epochs=1",
        "model.image.resolution=32",
        "teacher.resolution=32",
        "mask.block_size=1",
        "model.image.kwargs={patch_size: 8, embed_dim: 24, depth: 2, num_heads: 2}",
        "model.text={width: 16, heads: 2, layers: 1, context_length: 16}",
        "model.embed_dim=12",
        "data.lanes=4",
    ]
