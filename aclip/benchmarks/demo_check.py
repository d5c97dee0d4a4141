"""What the demo's runs of `make gpu-check` must have left, read from their output and run folders.

The launcher's status alone is not enough: deepspeed 0.19.8 ends with 0 where a signal has ended its
own helper.
"""

import re
from pathlib import Path

from aclip.benchmarks.parts import CheckFailed
from aclip.run_folder.layout import CHECKPOINTS_FOLDER, METRICS_FILE
from aclip.run_folder.metrics_file import Metrics, read_metrics

SHOWN = "zero_shot_top1"
MOST_APART = 0.02
"""How far a loss may be from another run's, as a share of it. Runs in bf16 that sum in another
order were up to 0.001 apart in 20 steps on a CPU; ranks that do not see each other's part of the
batch differ by 0.2."""


def has_trained(run: Path) -> bool:
    """Whether a run has logged a step."""
    return (run / METRICS_FILE).is_file() and bool(read_metrics(run).steps)


def check_stopped(run: Path, output: str) -> str:
    """Where a signal has stopped a run; raises CheckFailed if it left no checkpoint."""
    samples = re.search(r"stopped by SIGTERM at ([\d,]+) samples", output)
    if samples is None:
        raise CheckFailed("it does not say that SIGTERM stopped it")
    if not (run / CHECKPOINTS_FOLDER / "latest").is_file():
        raise CheckFailed("it left no checkpoint")
    return f"status 143 at {samples[1]} samples"


def check_continued(run: Path, num_steps: int, output: str) -> str:
    """From where a run continued and what it reached; raises CheckFailed if it began anew."""
    samples = re.search(r"continuing from \S+ at ([\d,]+) samples", output)
    if samples is None:
        raise CheckFailed("it does not say that it continued")
    metrics = _complete(run, num_steps)
    reached = {
        line.evaluation: f"{line.evaluation} {line.metrics[SHOWN]:.1%}"
        for line in metrics.evaluations
        if SHOWN in line.metrics
    }
    return f"from {samples[1]} samples; {SHOWN} {', '.join(reached.values())}"


def check_losses(run: Path, num_steps: int, other: Path, output: str) -> str:
    """A run's first and last loss, and how far its losses are from another run's, step by step.

    Raises:
        CheckFailed: they are more than MOST_APART from each other, or one run is incomplete.
    """
    mine, others = (
        {line.step: line.terms["loss"] for line in _complete(each, num_steps).steps}
        for each in (run, other)
    )
    apart = max(abs(mine[step] / others[step] - 1) for step in others)
    found = f"loss {mine[1]:.3f} to {mine[num_steps]:.3f}"
    if run == other:
        return found
    found = f"{found}, at most {apart:.2%} from {other.name}'s"
    if apart > MOST_APART:
        raise CheckFailed(f"{found}; {MOST_APART:.0%} is allowed")
    return found


def _complete(run: Path, num_steps: int) -> Metrics:
    metrics = read_metrics(run)
    last = metrics.steps[-1].step if metrics.steps else 0
    if last != num_steps:
        raise CheckFailed(f"{run.name} ended after step {last} of {num_steps}")
    if not any(line.samples == metrics.steps[-1].samples for line in metrics.evaluations):
        raise CheckFailed(f"{run.name} was not evaluated at its end")
    return metrics
