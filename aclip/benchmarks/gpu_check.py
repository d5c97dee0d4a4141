"""What a machine with a GPU makes of this project, as one report: `make gpu-check`.

Parts run one after another, each a program of its own with a limit of time. One that fails or runs
into its limit is reported, and the next one runs. The report grows as they end.
"""

import argparse
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import psutil
import torch

from aclip.cli import EXIT_FAILED_RUNS, run_reporting_errors, show_duration, text_table
from aclip.errors import ConfigError
from aclip.files import check_writable, write_whole
from aclip.machine import SHARED_MEMORY, check_gpus, usable_cores

REPORT, LOGS = "gpu-check.md", "logs"
LAST_LINES = 12
"""Of a part's output, in the report."""
LOOK = 0.5
SECONDS_TO_END = 20.0
"""Between SIGTERM and SIGKILL, once a part has run into its limit."""
PACKAGES = ("torch", "deepspeed", "triton", "transformers", "timm", "open_clip_torch")
DEMO = "train.epochs=2"
"""As much of the demo as shows that it learns."""
TWENTY_STEPS = ["train.epochs=0.0834", "train.warmup_epochs=0.01", "train.evaluate_every=0"]
"""Of the demo, whose epoch has 240 steps."""


@dataclass(frozen=True)
class Part:
    """A part of the check.

    Attributes:
        title: its name in the report.
        command: what is run.
        limit: seconds that it may take.
        stop_once: SIGTERM goes to the ranks once this file is there, and the part succeeds if the
            run ends with a checkpoint beside it.
        missing: why it can't be run here; empty if it can.
    """

    title: str
    command: list[str]
    limit: float
    stop_once: Path | None = None
    missing: str = ""


@dataclass(frozen=True)
class Outcome:
    """How a part ended: `ok`, or why not; the seconds that it took, and the end of its output."""

    title: str
    ended: str
    seconds: float
    last_lines: list[str]


def gpu_check(arguments: argparse.Namespace) -> int:
    """Runs every part and writes the report; returns the exit status.

    Raises:
        ConfigError: there is no GPU, or none that torch can use.
    """
    check_gpus()
    if not torch.cuda.is_available():
        raise ConfigError("no GPU is seen here, so there is nothing to check; run this on one")
    out = Path(arguments.out)
    check_writable(out / LOGS, "--out")
    outcomes: list[Outcome] = []
    parts = make_parts(out, torch.cuda.device_count(), _memory_gib(), arguments.compiled)
    for number, part in enumerate(parts, 1):
        print(f"=== {part.title} (at most {show_duration(part.limit)})", flush=True)
        outcomes.append(run_part(part, out / LOGS / f"{number:02d}.log"))
        print(f"--- {outcomes[-1].ended} after {show_duration(outcomes[-1].seconds)}", flush=True)
        write_whole(out / REPORT, make_report(describe_machine(), outcomes))
    print(f"wrote {out / REPORT}; the parts' output is in {out / LOGS}", flush=True)
    failed = [each for each in outcomes if not each.ended.startswith(("ok", "left out"))]
    return EXIT_FAILED_RUNS if failed else 0


def make_parts(out: Path, num_gpus: int, memory_gib: float, compiled: bool) -> list[Part]:
    """The parts in their order: what finds most comes first.

    Args:
        out: the report's folder, which gets the runs too.
        num_gpus: how many GPUs are visible.
        memory_gib: of the smallest of them.
        compiled: whether the kernels' references are timed under torch.compile too.
    """
    python = sys.executable
    runs = out.absolute() / "runs"

    def demo(name: str, ds_config: str, *words: str) -> list[str]:
        # 32 images a step, which 1, 2, 4 and 8 GPUs divide.
        ranks = max(n for n in (1, 2, 4, 8) if n <= num_gpus)
        launcher = [python, "-m", "deepspeed.launcher.runner", "--quiet"]
        launcher += ["--num_accelerators", str(ranks), "launch/pretrain.py"]
        chosen = ["--ds_config", f"ds_configs/{ds_config}.json", "--output", str(runs / name)]
        return [*launcher, *chosen, *words]

    batch_size = 512 if memory_gib >= 75 else 128
    benches = ["tests/kernel", "--benchmark-only", "-o", "python_files=bench_*.py"]
    if not compiled:
        benches += ["-k", "not compiled"]
    metrics = runs / "zero2" / "metrics.jsonl"
    no_compiler = "" if shutil.which("g++") else "g++ is missing, which builds Adam for the CPU"
    offload = Part("zero3_offload, 20 steps", demo("offload", "zero3_offload", *TWENTY_STEPS), 150)
    return [
        Part("the demo with zero2, stopped", demo("zero2", "zero2", DEMO), 120, stop_once=metrics),
        Part("the demo with zero2, resumed to its end", demo("zero2", "zero2", DEMO), 120),
        Part("the tests that need a GPU", [python, "-m", "pytest", "-m", "gpu", "-q"], 240),
        Part("zero3, 20 steps", demo("zero3", "zero3", *TWENTY_STEPS), 90),
        replace(offload, missing=no_compiler),
        Part(
            "views cut on the device, two workers, 20 steps",
            demo("device", "zero2", *TWENTY_STEPS, "data.crops=device", "data.workers=2"),
            90,
        ),
        Part(
            "compiled blocks, 20 steps",
            demo("compiled", "zero2", *TWENTY_STEPS, "model.compile=true"),
            150,
        ),
        Part(
            "the time that is predicted",
            [python, "launch/roofline.py", "--gpu", "h100", "--batch_sizes", str(batch_size)],
            120,
        ),
        Part(
            "the cost of a step",
            [python, "launch/benchmark.py", "--against", "open_clip"]
            + ["--batch_size", str(batch_size), "--json", str(out / "cost.json")],
            240,
        ),
        Part("kernel benchmarks", [python, "-m", "pytest", *benches], 180),
    ]


def run_part(part: Part, log: Path) -> Outcome:
    """Runs a part to its end, to its limit, or to the stop that belongs to it."""
    if part.missing:
        return Outcome(part.title, f"left out: {part.missing}", 0.0, [])
    start = time.monotonic()
    with open(log, "wb") as file:
        process = subprocess.Popen(
            part.command,
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        is_late = _wait(process, part, start)
    seconds = time.monotonic() - start
    lines = log.read_text(errors="replace").splitlines()
    return Outcome(part.title, _judge(process, part, is_late), seconds, lines[-LAST_LINES:])


def _wait(process: subprocess.Popen, part: Part, start: float) -> bool:
    """Waits for the end; returns whether the limit had to end it."""
    asked = False
    while process.poll() is None:
        if time.monotonic() - start > part.limit:
            os.killpg(process.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(SECONDS_TO_END)
            with suppress(ProcessLookupError):  # all that it has started may have ended
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return True
        if part.stop_once is not None and not asked and part.stop_once.exists():
            asked = True
            for rank in _ranks(process.pid):
                rank.send_signal(signal.SIGTERM)
        time.sleep(LOOK)
    return False


def _ranks(pid: int) -> list[psutil.Process]:
    """The training processes below a launcher; their data workers have their command line too."""
    below = psutil.Process(pid).children(recursive=True)
    found = [each for each in below if any("--local_rank" in word for word in each.cmdline())]
    pids = {each.pid for each in found}
    return [each for each in found if each.ppid() not in pids]


def _judge(process: subprocess.Popen, part: Part, is_late: bool) -> str:
    if is_late:
        return f"FAILED: it did not end in {show_duration(part.limit)}"
    if part.stop_once is not None:
        has_saved = (part.stop_once.parent / "checkpoints" / "latest").is_file()
        if process.returncode and has_saved:
            return "ok: stopped, with a checkpoint"
        return f"FAILED: status {process.returncode}, checkpoint {'there' if has_saved else 'none'}"
    return "ok" if process.returncode == 0 else f"FAILED: status {process.returncode}"


def describe_machine() -> list[tuple[str, str]]:
    """What the report says of the machine."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    driver = "unknown"
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0]
    shared = shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else 0
    return [
        ("GPUs", ", ".join(gpus) or "none"),
        ("driver, CUDA", f"{driver}, {torch.version.cuda}"),
        ("cores, /dev/shm", f"{usable_cores()}, {shared / 2**30:.1f} GiB"),
        ("Python", platform.python_version()),
        *((name, version(name)) for name in PACKAGES),
    ]


def make_report(machine: list[tuple[str, str]], outcomes: list[Outcome]) -> str:
    """The report as Markdown: the machine, how each part ended, and the end of its output."""
    rows = [("part", "how it ended", "time")]
    rows += [(each.title, each.ended, show_duration(each.seconds)) for each in outcomes]
    blocks = ["# gpu-check", _code(text_table(machine)), _code(text_table(rows, left=(0, 1)))]
    for each in outcomes:
        if each.last_lines:
            blocks += [f"## {each.title}", _code("\n".join(each.last_lines))]
    return "\n\n".join(blocks) + "\n"


def _code(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


def _memory_gib() -> float:
    devices = range(torch.cuda.device_count())
    return min(torch.cuda.get_device_properties(each).total_memory for each in devices) / 2**30


def main() -> int:
    parser = argparse.ArgumentParser(prog="gpu-check", description=__doc__)
    parser.add_argument("--out", default="gpu-check", help="folder of the report")
    parser.add_argument(
        "--compiled", action="store_true", help="also time references under torch.compile"
    )
    return gpu_check(parser.parse_args())


if __name__ == "__main__":
    run_reporting_errors(main)
