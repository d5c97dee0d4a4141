"""What a run tells of itself, by rank 0 alone: progress lines, metrics.jsonl, pictures, report,
TensorBoard and a tracker."""

import json
import math
import resource
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aclip import distributed
from aclip.cli import show_duration
from aclip.distributed import say
from aclip.errors import NotWritten
from aclip.files import append, make_folder, write_whole
from aclip.reports.mask_pictures import encode
from aclip.reports.report import write_report
from aclip.run_folder.layout import METRICS_FILE, TENSORBOARD_FOLDER, picture_path
from aclip.run_folder.metrics_file import EvaluationLine, StepLine, flatten, parse_line
from aclip.training.metrics.tensorboard_writer import TensorBoard
from aclip.training.metrics.wandb_tracker import WandbTracker

RATE_WINDOW = 20
"""Progress lines that the remaining time is estimated from."""
HEADLINES = ("_top1", "_r1", "object_patches_kept", "attention_kept", "clustered")
"""How the names of the metrics end that are printed; metrics.jsonl and the report have all."""


class MetricsLogger:
    """Writes a run's metrics; on ranks other than 0 every method does nothing.

    Args:
        run_folder: gets metrics.jsonl and the folders tensorboard and pictures.
        total_samples, total_steps: samples and steps of the whole run.
        resumed_samples: the samples at which this process goes on; what was written beyond is
            dropped. With 0 the file starts anew.
        tracker: gets every number and picture that TensorBoard gets; see WandbTracker.
        clock: gives the time in seconds.
    """

    def __init__(
        self,
        run_folder: Path,
        total_samples: int,
        total_steps: int,
        resumed_samples: int = 0,
        tracker: WandbTracker | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._run_folder = run_folder
        self._total_samples, self._total_steps = total_samples, total_steps
        self._tracker = tracker
        self._clock = clock
        self._marks = deque(maxlen=RATE_WINDOW + 1)
        self._is_writer = distributed.rank() == 0
        if not self._is_writer:
            return
        make_folder(run_folder)
        self._file = run_folder / METRICS_FILE
        # A new run evaluates at 0 samples; a resumed run does not evaluate at 0 again.
        purge_from = resumed_samples + 1 if resumed_samples else 0
        self._keep(lambda line: line["samples"] < purge_from)
        self._tensorboard = TensorBoard(run_folder / TENSORBOARD_FOLDER, purge_from)

    def log(self, line: StepLine) -> None:
        """Writes a log step and prints its progress line."""
        if not self._is_writer:
            return
        line = StepLine(**_plain(asdict(line)))
        values = asdict(line)
        for name in ("noted", "taught", "keep_ratio"):  # as in most runs
            if values[name] in (None, {}):
                del values[name]
        self._append(values)
        rest = {k: v for k, v in values.items() if k not in ("samples", "terms")}
        self._plot({"terms": line.terms, "train": rest}, line.samples)
        self._marks.append((self._clock(), line.samples))
        say(self._progress(line))

    def log_evaluation(self, line: EvaluationLine) -> None:
        """Writes and prints one model's evaluation; an earlier one at the same samples goes."""
        if not self._is_writer:
            return
        line = EvaluationLine(**_plain(asdict(line)))
        place = {"samples": line.samples, "evaluation": line.evaluation}
        try:
            self._keep(lambda written: not place.items() <= written.items())
        except NotWritten as error:  # the earlier one stays beside this one
            say(f"{error}; the run goes on")
        values = asdict(line)
        if not line.warning:
            del values["warning"]
        self._append(values)
        self._plot({line.evaluation: line.metrics}, line.samples)
        self._tensorboard.flush()
        shares = ((name, line.metrics[name]) for name in line.metrics if name.endswith(HEADLINES))
        shown = [f"{name} {100 * value:.2f} %" for name, value in shares if value is not None]
        if line.metrics.get("num_skipped"):
            shown.append(f"{line.metrics['num_skipped']:,.0f} images can't be used")
        say("  ".join([f"evaluation of {line.evaluation} at {line.samples:,} samples", *shown]))
        if line.warning:
            say(f"warning: {line.warning}")

    def log_kept_patches(self, picture: np.ndarray, samples: int) -> None:
        """Writes the (H, W, 3) uint8 picture of kept patches, and adds it to TensorBoard."""
        if not self._is_writer:
            return
        path = picture_path(self._run_folder, samples)
        try:
            write_whole(path, encode(picture))
        except NotWritten as error:  # a missing picture must not end the run
            say(f"{error}; the run goes on")
        self._tensorboard.log_image("kept_patches", picture, samples)
        if self._tracker is not None:
            self._tracker.log_image("kept_patches", picture, samples)

    def write_report(self) -> None:
        """Writes report.html and report.md about all that was logged."""
        if not self._is_writer:
            return
        try:
            write_report([self._run_folder], self._run_folder)
        # Whatever is wrong with a report, it must not end a run of days.
        except Exception as error:
            say(f"the report was not written: {type(error).__name__}: {error}")

    def close(self) -> None:
        if self._is_writer:
            self._tensorboard.close()
            if self._tracker is not None:
                self._tracker.close()

    def _plot(self, values: dict[str, Any], samples: int) -> None:
        numbers = dict(flatten(values))
        self._tensorboard.log(numbers, samples)
        if self._tracker is not None:
            self._tracker.log(numbers, samples)

    def _append(self, line: dict) -> None:
        """Appends a whole line or none; a full disk costs the line, not the run."""
        try:
            append(self._file, f"{json.dumps(line, allow_nan=False)}\n".encode())
        except NotWritten as error:
            say(f"{error}; the run goes on, and the file lacks a line")

    def _keep(self, wanted: Callable[[dict], bool]) -> None:
        """Rewrites the file without the lines that are not wanted, all at once or not at all."""
        if not self._file.exists():
            return
        lines = self._file.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [text for text in lines if (line := parse_line(text)) is not None and wanted(line)]
        if kept == lines:
            return
        write_whole(self._file, "".join(kept).encode())

    def _progress(self, line: StepLine) -> str:
        samples, total = line.samples, self._total_samples
        parts = [
            f"step {line.step:,}/{self._total_steps:,}",
            f"{samples:,} samples ({100 * samples / total:.1f} %)",
        ]
        parts += [f"{name} {_show(value, '.4g')}" for name, value in line.terms.items()]
        for value, form in (
            (line.images_per_second, "{:,.4g} img/s"),
            (line.data_wait_percent, "data wait {:.0f} %"),
            (line.taught, "taught {:.0%}"),
            (line.keep_ratio, "keeps {:.1%}"),
            (line.learning_rate, "lr {:.2e}"),
            (line.memory_gib, "{:.1f} GiB"),
        ):
            if value is not None:
                parts.append(form.format(value))
        if line.skipped:
            kinds = ", ".join(f"{kind} {count:,}" for kind, count in line.skipped.items())
            parts.append(f"skipped {sum(line.skipped.values()):,} ({kinds})")
        if line.repeated:
            parts.append(f"repeated {line.repeated:,}")
        parts += [f"{kind} {count:,}" for kind, count in line.noted.items()]
        return "  ".join([*parts, f"ETA {self._remaining(samples, line.images_per_second)}"])

    def _remaining(self, samples: int, images_per_second: float | None) -> str:
        """Time to the end at the pace of the last progress lines, evaluations included."""
        (first_time, first), (last_time, last) = self._marks[0], self._marks[-1]
        pace = images_per_second
        if last > first and last_time > first_time:
            pace = (last - first) / (last_time - first_time)
        if not pace:
            return "unknown"
        return show_duration(max(0, self._total_samples - samples) / pace)


def peak_memory_gib() -> float:
    """The most memory that this rank has held on its device, or this process without a device."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB


def _plain(value: Any) -> Any:
    """Tensors and arrays of one number as numbers; what is not finite as None, as JSON asks for."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _show(value: float | None, form: str) -> str:
    return "not finite" if value is None else format(value, form)
