"""An ablation from its command line to its report: the work behind launch/ablate.py."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from aclip.ablation.devices import choose_devices
from aclip.ablation.prepare import Prepared, prepare
from aclip.ablation.results import Page, Result, page_of_json, read_results
from aclip.ablation.runner import Runner
from aclip.ablation.runs import Run
from aclip.cli import EXIT_FAILED_RUNS, EXIT_STOPPED_BY_SIGNAL
from aclip.errors import NotWritten
from aclip.files import check_writable
from aclip.machine import check_gpus


def ablate(arguments: argparse.Namespace) -> int:
    """Runs `launch/ablate.py` with its parsed arguments; returns the exit status.

    Raises:
        ConfigError: see prepare, or there is no free device.
        NotWritten: the report, which has been printed, or a run's folder could not be written.
    """
    output = Path(arguments.output)
    if arguments.report_only:
        page = page_of_json(Path(arguments.report_only))
        check_writable(output, "--output")
        _show(page, output)
        return 0
    check_gpus()
    prepared = prepare(arguments)
    title = f"Ablation {output.name}"
    command = [sys.executable, arguments.script, "--ds_config", arguments.ds_config]
    command += ["--recipe", arguments.recipe]

    def train(runs: list[Run]) -> tuple[list[Run], bool]:
        num_left = sum(not run.is_finished for run in runs)
        devices = choose_devices(arguments.processes, num_left) if num_left else []
        runner = Runner(command, devices, report, arguments.keep_checkpoints)
        return runner.run(runs)

    def page() -> Page:
        return Page(title, prepared.note, results_so_far(prepared))

    def report() -> None:
        # Imported here: charts take seconds, which no wrong input should cost.
        from aclip.ablation.report import write_report

        try:
            write_report(page(), output)
        except NotWritten as error:  # a full disk must not end the runs
            print(f"the report was not written: {error}", flush=True)

    failed, was_stopped = [], False
    if prepared.sweep is not None:
        print("learning rates first, in short runs on a seed of their own", flush=True)
        failed, was_stopped = train(prepared.sweep.runs)
    runs = prepared.runs()
    undecided = prepared.undecided()
    if not was_stopped:
        chosen = [run for run in runs if run.case.name not in undecided]
        for run in chosen:
            run.check()
        failed_here, was_stopped = train(chosen)
        failed += failed_here
    reached = page()
    if any(result.outcomes or result.rates for result in reached.results):
        _show(reached, output)
    if was_stopped:
        print("stopped; the same command continues", flush=True)
        return EXIT_STOPPED_BY_SIGNAL
    if failed:
        print(f"{len(failed)} runs failed; the same command tries them again")
    if undecided:
        print(f"the sweep found no learning rate for {', '.join(sorted(undecided))}")
    return EXIT_FAILED_RUNS if failed or undecided else 0


def results_so_far(prepared: Prepared) -> list[Result]:
    results = read_results(prepared.runs())
    if prepared.sweep is None:
        return results
    return [
        replace(
            result,
            rates=prepared.sweep.accuracies(case.name),
            rate=prepared.sweep.rate(case.name),
        )
        for case, result in zip(prepared.cases, results, strict=True)
    ]


def _show(page: Page, output: Path) -> None:
    """Prints the page, and writes it."""
    from aclip.ablation.report import MARKDOWN, PAGE, make_report, write_files

    files = make_report(page)
    print(files[MARKDOWN].decode(), end="", flush=True)  # before a write that can fail
    write_files(files, output)
    print(f"wrote {output / PAGE} and {output / MARKDOWN}", flush=True)
