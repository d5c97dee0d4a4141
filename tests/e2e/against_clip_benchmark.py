"""CPU time of launch/evaluate.py against clip_benchmark's, on one model and the built-in scenes.

    python tests/e2e/against_clip_benchmark.py runs/demo

Both evaluate the same open_clip export, classification and retrieval, as commands of their own; the
median of the rounds counts, and starting Python and importing torch count too.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from clip_benchmark_venv import ROOT, clip_benchmark_arguments, ensure_command, write_layout

from aclip.data.demo import ensure_demo_data
from aclip.weights.export import export


def cpu_seconds(*commands: list[str]) -> float:
    """User and system time of the commands and of all that they start."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    for command in commands:
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="a run or a checkpoint")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    demo = ensure_demo_data()
    names = (demo.folder / "classnames.txt").read_text().split("\n")[:-1]
    templates = (demo.folder / "zeroshot_classification_templates.txt").read_text().split("\n")
    clip_benchmark = ensure_command()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        out = folder / "export"
        values = {"checkpoint": arguments.checkpoint, "out": str(out), "model": None}
        export(argparse.Namespace(**values, format="open_clip"))
        sets = {"classification": folder / "classes", "retrieval": folder / "captions"}
        write_layout(sets["classification"], Path(demo.val[0]), names, templates[:-1])
        write_layout(sets["retrieval"], Path(demo.val[0]), None, [])
        theirs = [
            [clip_benchmark, *clip_benchmark_arguments(out, dataset, task, folder / f"{task}.json")]
            for task, dataset in sets.items()
        ]
        ours = [sys.executable, "launch/evaluate.py", str(out), "--output", str(folder / "ours")]
        ours += ["--suite", *map(str, sets.values())]
        times = {"clip_benchmark": [], "aclip": []}
        for number in range(arguments.rounds):
            os.environ["ACLIP_CACHE"] = str(folder / f"cache-{number}")  # embeds prompts each time
            times["clip_benchmark"].append(cpu_seconds(*theirs))
            times["aclip"].append(cpu_seconds(ours))
            print(*(f"{name} {own[-1]:.1f} s" for name, own in times.items()), flush=True)
        medians = {name: statistics.median(own) for name, own in times.items()}
        results = json.loads((folder / "ours" / "results.json").read_text())["sets"]
        accuracy = json.loads((folder / "classification.json").read_text())["metrics"]["acc1"]
        own_accuracy = results[str(sets["classification"])]["metrics"]["zero_shot_top1"]
    print(f"top-1 {own_accuracy:.4f} here, {accuracy:.4f} there")
    ratio = medians["aclip"] / medians["clip_benchmark"]
    print(f"CPU time: {medians['aclip']:.1f} s / {medians['clip_benchmark']:.1f} s = {ratio:.2f}")


if __name__ == "__main__":
    main()
