"""The conversion script as a user starts it, killed at random, and given bad arguments."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).parents[2]
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}
NUM_PAIRS, SHARD_SIZE = 2000, 16  # more than a second of work, so that a signal meets it
OPTIONS = ("--shard-size", str(SHARD_SIZE), "--short-side", "48", "--processes", "2")


def start(*arguments: str) -> subprocess.Popen:
    """The script in a process group of its own, where Ctrl-C means what it does in a terminal: a
    shell that runs the tests in the background lets them, and what they start, ignore it."""
    return subprocess.Popen(
        [sys.executable, "launch/convert.py", *arguments],
        cwd=ROOT,
        env=ENV,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def run(*arguments: str) -> tuple[int, str, str]:
    """Status, output, errors."""
    process = start(*arguments)
    output, errors = process.communicate(timeout=240)
    return process.returncode, output, errors


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    """A folder of pairs, some of them unusable."""
    folder = tmp_path_factory.mktemp("pairs")
    rng = np.random.default_rng(0)
    for number in range(NUM_PAIRS):
        pixels = rng.integers(0, 256, (96, 128, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:04d}.png", compress_level=1)
        (folder / f"{number:04d}.txt").write_text(f"picture &eacute; {number}")
    for number in range(0, NUM_PAIRS, 50):
        (folder / f"{number:04d}.png").write_bytes(b"no picture")
    return folder


@pytest.fixture(scope="module")
def whole(pairs, tmp_path_factory) -> dict[str, bytes]:
    """The files of a conversion that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "out"
    status, output, errors = run("folder", str(pairs), "--out", str(out), *OPTIONS)
    assert status == 0, errors
    good = NUM_PAIRS - NUM_PAIRS // 50
    table = dict(line.split()[:2] for line in output.splitlines())
    assert table["entries"] == f"{NUM_PAIRS:,}"
    assert table["samples"] == f"{good:,}"
    assert table["unreadable_image"] == table["skipped"] == str(NUM_PAIRS - good)
    files = contents(out)
    assert sum(json.loads(files["sizes.json"]).values()) == good
    assert len(files) == NUM_PAIRS // SHARD_SIZE + 2
    return files


def wait_for_shards(out: Path, count: int, process: subprocess.Popen) -> None:
    """Returns once there are `count` shards, or the process has ended."""
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        if (out / ".conversion").is_dir() and len(list(out.glob("*.tar"))) >= count:
            return
        time.sleep(0.005)


def test_killed_at_random_and_started_again_the_files_are_the_same(pairs, whole, tmp_path):
    rng = random.Random(0)
    out, seen = tmp_path / "out", []
    while True:
        process = start("folder", str(pairs), "--out", str(out), *OPTIONS)
        if len(seen) == 5:
            break
        # The first kill meets the planning, the others the writing.
        wait_for_shards(out, seen[-1] + rng.randint(1, 4) if seen else 0, process)
        time.sleep(rng.uniform(0, 0.2))
        if process.poll() is not None:
            break
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        seen.append(len(list(out.glob("*.tar"))))
    process.communicate(timeout=240)
    assert process.returncode == 0
    assert len(seen) > 1 and seen == sorted(seen), "kills, and finished shards stay"
    assert contents(out) == whole


def test_workers_end_when_only_the_main_process_is_killed(pairs, whole, tmp_path):
    out = tmp_path / "out"
    process = start("folder", str(pairs), "--out", str(out), *OPTIONS)
    wait_for_shards(out, 1, process)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 60
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(process.pid, 0)
            time.sleep(0.05)
    status, _, errors = run("folder", str(pairs), "--out", str(out), *OPTIONS)
    assert status == 0, errors
    assert contents(out) == whole


def test_ctrl_c_ends_with_a_line_and_the_same_command_continues(pairs, whole, tmp_path):
    out = tmp_path / "out"
    process = start("folder", str(pairs), "--out", str(out), *OPTIONS)
    wait_for_shards(out, 0, process)  # it has begun; later it could end before the signal
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 130
    assert "run the same command again" in errors and "Traceback" not in errors
    assert run("folder", str(pairs), "--out", str(out), *OPTIONS)[0] == 0
    assert contents(out) == whole


def test_a_killed_worker_ends_the_conversion_with_a_sentence(pairs, tmp_path):
    out = tmp_path / "out"
    process = start("folder", str(pairs), "--out", str(out), *OPTIONS)
    wait_for_shards(out, 1, process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 2
    assert "error: a process that writes shards was killed" in errors
    assert "Traceback" not in errors


def test_two_conversions_into_one_folder_are_refused(pairs, tmp_path):
    out = tmp_path / "out"
    first = start("folder", str(pairs), "--out", str(out), *OPTIONS)
    wait_for_shards(out, 1, first)
    first.send_signal(signal.SIGSTOP)
    status, _, errors = run("folder", str(pairs), "--out", str(out), *OPTIONS)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    assert status == 2
    assert f"error: --out is {out}, which another conversion (process {first.pid} " in errors


def test_a_bad_argument_ends_with_one_sentence(tmp_path):
    status, _, errors = run("folder", "/nowhere", "--out", str(tmp_path / "out"))
    assert status == 2
    assert errors == "error: FOLDER is /nowhere, but there is no such folder; check the path\n"


def test_a_bad_list_ends_with_one_sentence(tmp_path):
    (tmp_path / "x.jsonl").write_text("{}\n")
    arguments = ("yfcc15m", str(tmp_path / "x.jsonl"), "--images", str(tmp_path))
    status, _, errors = run(*arguments, "--out", str(tmp_path / "out"))
    assert status == 2
    assert "Traceback" not in errors and errors.count("error: ") == 1
    assert "x.jsonl line 1 is not an object with id, title and description" in errors
