"""What a machine with a GPU makes of this project, as one report: `make gpu-check`."""

import argparse
import json
import os
import platform
import re
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch

from aclip.benchmarks.demo_check import (
    check_continued,
    check_losses,
    check_stopped,
    has_trained,
)
from aclip.benchmarks.parts import FAILED, OK, RUNNING, CheckFailed, Outcome, Part, run_parts
from aclip.cli import (
    EXIT_FAILED_RUNS,
    EXIT_STOPPED_BY_SIGNAL,
    path,
    run_reporting_errors,
    show_duration,
    text_table,
)
from aclip.errors import ConfigError
from aclip.files import check_writable, write_whole
from aclip.machine import SHARED_MEMORY, VISIBLE, check_gpus, driver_version, usable_cores

REPORT, FIGURES, COST = "gpu-check.md", "gpu-check.json", "cost.json"
LOGS, RUNS = "gpu-check-logs", "gpu-check-runs"
ROOT = Path(__file__).parents[2]
PACKAGES = ("triton", "deepspeed", "transformers", "timm", "open_clip_torch")
DEMO, DEMO_STEPS = ["train.samples=25600", "train.log_every=20"], 200
"""As much of the demo as shows that it learns."""
TWENTY_STEPS = [
    "train.samples=2560",
    "train.warmup_epochs=0.02",
    "optimizer.name=adamw",  # ZeRO-offload updates no Muon
    "optimizer.lr=0.001",
    "train.evaluate_every=0",
    "train.log_every=1",
    "data.crops=device",
    "data.workers=2",
]
COMPARED = ["clip_vitb16", "aclip_vitb16", "aclip_eff_vitb16"]
"""In the cost table. By its plan SLIP takes 84 GiB at 512 images."""
BATCH_SIZES = ((75, 512), (44, 256), (28, 128), (20, 64))
"""(GiB of a GPU's memory, images of a step in the cost table); below that 16. The three recipes and
open_clip keep about 12 GiB between steps, and no step takes more than 0.1 GiB an image."""
MOST_PYTEST_WORKERS = 4


def gpu_check(arguments: argparse.Namespace) -> int:
    """Runs every part and writes the report; returns the exit status.

    Raises:
        ConfigError: there is no GPU, or none that torch can use.
    """
    if not arguments.minutes > 0:
        raise ConfigError(f"--minutes is {arguments.minutes:g}; give more than 0")
    machine = describe_machine()
    print(text_table(list(machine.items()), left=(0, 1)), flush=True)
    check_gpus()
    if not torch.cuda.is_available():
        raise ConfigError("no GPU is seen here, so there is nothing to check; run this on one")
    out = Path(arguments.out)
    check_writable(out / LOGS, "--out")
    # An older check's runs would be continued.
    shutil.rmtree(out / RUNS, ignore_errors=True)
    # Or a part would outlive this process, since it has a session of its own.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_STOPPED_BY_SIGNAL))

    def tell(outcomes: list[Outcome]) -> None:
        _print_last(outcomes[-1])
        write_whole(out / REPORT, make_report(machine, outcomes))
        figures = {"machine": machine, "parts": [asdict(each) for each in outcomes]}
        write_whole(out / FIGURES, json.dumps(figures, indent=2))

    parts = make_parts(out, torch.cuda.device_count(), _memory_gib(), arguments.compiled)
    outcomes = run_parts(parts, out / LOGS, 60 * arguments.minutes, tell)
    failed = sum(each.ended == FAILED for each in outcomes)
    print(f"{failed or 'none'} of {len(outcomes)} parts failed; wrote {out / REPORT}", flush=True)
    return EXIT_FAILED_RUNS if failed else 0


def make_parts(out: Path, num_gpus: int, memory_gib: float, compiled: bool) -> list[Part]:
    """The parts in their order: what finds most comes first.

    Args:
        out: the report's folder, which gets the runs too.
        num_gpus: how many GPUs are visible.
        memory_gib: of the smallest of them.
        compiled: whether the kernels' references are timed under torch.compile too.
    """
    python, runs = sys.executable, out.absolute() / RUNS
    # 128 images a step, which 1, 2, 4 and 8 ranks divide.
    ranks = max(n for n in (1, 2, 4, 8) if n <= max(1, num_gpus))

    def demo(name: str, ds_config: str, words: list[str], ranks: int = ranks) -> list[str]:
        launcher = [python, "-m", "deepspeed.launcher.runner", "--quiet", *_devices(ranks)]
        chosen = ["--ds_config", f"ds_configs/{ds_config}.json", "--output", str(runs / name)]
        return [*launcher, "launch/pretrain.py", *chosen, *words]

    def twenty_steps(
        title: str, name: str, ds_config: str, *words: str, limit: float = 60, **options
    ) -> Part:
        command = demo(name, ds_config, [*TWENTY_STEPS, *words], options.pop("ranks", ranks))
        check: Callable[[str], str] = partial(check_losses, runs / name, 20, runs / "zero2")
        return Part(f"{title}, 20 steps", command, limit, check=check, **options)

    started = demo("demo", "zero2", DEMO)
    workers = str(min(MOST_PYTEST_WORKERS, usable_cores()))
    # Collecting the other folders, which have no such tests, would take half a minute.
    tests = ["tests/kernel", "-m", "gpu", "-q", "-n", workers]
    benches = ["tests/kernel", "--benchmark-only", "-o", "python_files=bench_*.py"]
    benches += ["--benchmark-quiet"]  # no tables, but a line for each row, with the device's time
    if not compiled:
        benches += ["-k", "not compiled"]
    cost = ["--against", "open_clip", "--batch_size", str(batch_size(memory_gib))]
    return [
        Part(
            f"the demo with zero2 on {ranks} GPU{'s'[: ranks > 1]}, stopped",
            started,
            90,  # the first start draws the scenes
            status=EXIT_STOPPED_BY_SIGNAL,
            stop_when=partial(has_trained, runs / "demo"),
            check=partial(check_stopped, runs / "demo"),
        ),
        Part(
            "the demo, resumed to its end",
            started,
            60,
            check=partial(check_continued, runs / "demo", DEMO_STEPS),
        ),
        Part("tests that need a GPU", [python, "-m", "pytest", *tests], 240, check=_count_tests),
        twenty_steps("zero2, views cut on the device, two workers", "zero2", "zero2"),
        twenty_steps("zero3", "zero3", "zero3"),
        twenty_steps(
            "zero3_offload",
            "zero3_offload",
            "zero3_offload",
            limit=120,  # Adam for the CPU is built first
            left_out="" if shutil.which("g++") else "g++ is missing, which builds Adam for the CPU",
        ),
        twenty_steps("compiled blocks", "compiled", "zero2", "model.compile=true", limit=90),
        twenty_steps(
            "zero2 on one GPU",
            "one-gpu",
            "zero2",
            ranks=1,
            left_out="" if ranks > 1 else "the runs above had one GPU",
        ),
        Part(
            "the cost of a step",
            [python, "launch/benchmark.py", *COMPARED, *cost, "--json", str(out.absolute() / COST)],
            120,
            num_lines=24,
        ),
        Part("kernel benchmarks", [python, "-m", "pytest", *benches], 120, num_lines=60),
    ]


def _count_tests(output: str) -> str:
    """How many tests passed, from pytest's last line."""
    last = (output.splitlines() or [""])[-1]
    if not re.search(r"[1-9]\d* passed", last):
        raise CheckFailed(f"no test has passed: {last}")
    return last


def batch_size(memory_gib: float) -> int:
    """Images of a step that fill a GPU in the cost table, whose systems share its memory."""
    return next((size for least, size in BATCH_SIZES if memory_gib >= least), 16)


def _devices(ranks: int) -> list[str]:
    """The launcher's words for so many of the visible GPUs; it forgets what is visible when it is
    told a number."""
    visible = [word.strip() for word in os.environ.get(VISIBLE, "").split(",") if word.strip()]
    if visible:
        return ["--include", f"localhost:{','.join(visible[:ranks])}"]
    return ["--num_accelerators", str(ranks)]


def describe_machine() -> dict[str, str]:
    """What the report says of the machine."""
    properties = [torch.cuda.get_device_properties(each) for each in _gpus()]
    gpus = [f"{each.name} ({each.total_memory / 2**30:.0f} GiB)" for each in properties]
    shared = shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else 0
    return {
        "GPUs": ", ".join(gpus) or "none that torch can use",
        "driver": driver_version(),
        "torch": f"{torch.__version__}, for CUDA {torch.version.cuda}",
        "cores": str(usable_cores()),
        "/dev/shm": f"{shared / 2**30:.1f} GiB free",
        "Python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
    }


def make_report(machine: dict[str, str], outcomes: list[Outcome]) -> str:
    """The report as Markdown: the machine, how each part ended, and the end of its output."""
    rows = [("part", "time", "how it ended")]
    rows += [(each.title, show_duration(each.seconds), each.verdict) for each in outcomes]
    tables = [text_table(list(machine.items()), left=(0, 1)), text_table(rows, left=(0, 2))]
    blocks = ["# gpu-check", *map(_code, tables)]
    for each in outcomes:
        if each.last_lines:
            blocks += [f"## {each.title}", _code("\n".join(each.last_lines))]
    return "\n\n".join(blocks) + "\n"


def _print_last(outcome: Outcome) -> None:
    if outcome.ended == RUNNING:
        print(f"=== {outcome.title} ({outcome.remark})", flush=True)
        return
    title = "" if outcome.ended in (OK, FAILED) else f"{outcome.title}: "
    for line in outcome.last_lines:
        print(f"    {line}")
    print(f"--- {title}{outcome.verdict} ({show_duration(outcome.seconds)})", flush=True)


def _code(text: str) -> str:
    return "\n".join(f"    {line}".rstrip() for line in text.splitlines())


def _gpus() -> range:
    return range(torch.cuda.device_count())


def _memory_gib() -> float:
    return min(torch.cuda.get_device_properties(each).total_memory for each in _gpus()) / 2**30


def main() -> int:
    parser = argparse.ArgumentParser(prog="gpu-check", description=__doc__)
    parser.add_argument("--out", default="gpu-check", type=path, help="folder of the report")
    parser.add_argument(
        "--minutes", default=8, type=float, help="for all parts; what comes later has failed"
    )
    parser.add_argument(
        "--compiled", action="store_true", help="also time the kernels' references compiled"
    )
    return gpu_check(parser.parse_args())


if __name__ == "__main__":
    run_reporting_errors(main)
