"""One pre-training run, from its arguments to its results: the work behind launch/pretrain.py."""

import argparse
import signal
from pathlib import Path

from aclip.cli import text_table
from aclip.config.arguments import DEMO, read_recipe
from aclip.distributed import say
from aclip.run_folder.layout import REPORT_PAGE, picture_path
from aclip.training.demo_comparison import compare_with_kept_results
from aclip.training.start import check_start


def pretrain(arguments: argparse.Namespace) -> int:
    """Runs `launch/pretrain.py` with its parsed arguments; returns the exit status.

    Raises:
        ConfigError: bad input, before the first step; or a shard that can not be read.
    """
    # Until training listens for it: a request for a checkpoint must not end a run that starts.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    start = check_start(arguments)
    if (reached := start.reached) is not None:
        print_results(start.run_folder, reached["samples"], reached["evaluations"])
        _compare(arguments)
        return 0
    say("the input is checked; loading DeepSpeed and building the towers")
    # Imported here: DeepSpeed and the towers take seconds, which no wrong input should cost.
    from aclip.training.checked_run import join_ranks, train

    device, watchdog = join_ranks(start)
    status, trainer = train(start, device, watchdog)
    if status == 0:
        print_results(start.run_folder, trainer.samples, trainer.evaluations)
        _compare(arguments)
    return status


def _compare(arguments: argparse.Namespace) -> None:
    """Prints what other masks reached in the demo's place, where the run was the demo."""
    if arguments.recipe != DEMO:  # another recipe's file may be gone by now
        return
    if comparison := compare_with_kept_results(read_recipe(arguments)):
        say(comparison)


def print_results(run_folder: Path, samples: int, evaluations: dict[str, dict]) -> None:
    """Prints what a complete run has reached, and where its pages are.

    Args:
        samples: samples that the run has seen.
        evaluations: the run's evaluations, as the trainer keeps them.
    """
    if "end" in evaluations:  # which a run lacks that went on without a validation set
        say(results_table(evaluations))
    say(f"the run is complete: {run_folder}")
    figure = picture_path(run_folder, samples)
    for name, path in (("report", run_folder / REPORT_PAGE), ("figure of kept patches", figure)):
        if path.is_file():
            say(f"{name}: {path}")


def results_table(evaluations: dict[str, dict]) -> str:
    """Chance, before, student and teacher as a text table, one row per metric, in percent."""
    before, end = evaluations.get("before", {}), evaluations["end"]
    columns = [
        ("chance", end.get("chance", {})),
        ("before", before.get("student", {})),
        ("student", end.get("student", {})),
        ("teacher", end.get("teacher", {})),
    ]
    columns = [(title, values) for title, values in columns if values]
    rows = [["", *(title for title, _ in columns)]]
    for name in end["student"]:
        if not name.startswith("num_"):
            cells = (f"{100 * v[name]:.1f}%" if name in v else "" for _, v in columns)
            rows.append([name, *cells])
    return text_table(rows)
