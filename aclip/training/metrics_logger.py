"""What a run reports: progress lines, metrics.jsonl, TensorBoard and a tracker, by rank 0 alone."""

import json
import math
import resource
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aclip import distributed
from aclip.cli import show_duration
from aclip.files import write_whole
from aclip.run_folder.layout import METRICS_FILE, TENSORBOARD_FOLDER
from aclip.run_folder.metrics_file import _parse, flatten
from aclip.training.wandb_tracker import WandbTracker

RATE_WINDOW = 20
"""Progress lines that the remaining time is estimated from."""


class MetricsLogger:
    """Writes a run's metrics; on ranks other than 0 every method does nothing.

    metrics.jsonl holds one JSON object a line: `{"samples", "step", "terms", ...}` for a log step,
    `{"samples", "evaluation", "metrics"}` for an evaluation. TensorBoard's axis is samples.

    Args:
        run_folder: gets metrics.jsonl and the folder tensorboard.
        total_samples: of the whole run.
        resumed_samples: where this process goes on; what was written beyond is dropped. With 0 the
            file starts anew.
        tracker: gets every number and picture that TensorBoard gets; see WandbTracker.
        clock: seconds.
    """

    def __init__(
        self,
        run_folder: Path,
        total_samples: int,
        resumed_samples: int = 0,
        tracker: WandbTracker | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._total_samples = total_samples
        self._tracker = tracker
        self._clock = clock
        self._marks = deque(maxlen=RATE_WINDOW + 1)
        self._is_writer = distributed.rank() == 0
        if not self._is_writer:
            return
        # Here, because other ranks and other users of this module can do without it.
        from torch.utils.tensorboard import SummaryWriter

        run_folder.mkdir(parents=True, exist_ok=True)
        self._file = run_folder / METRICS_FILE
        # A new run evaluates at 0 samples, a resumed one does not do again what was done there.
        purge_from = resumed_samples + 1 if resumed_samples else 0
        self._keep(lambda line: line["samples"] < purge_from)
        self._tensorboard = SummaryWriter(
            str(run_folder / TENSORBOARD_FOLDER), purge_step=purge_from
        )

    def log(self, step: int, samples: int, terms: dict[str, Any], **values: Any) -> None:
        """Writes a log step and prints its progress line.

        Args:
            step: optimizer steps done.
            samples: samples seen.
            terms: numbers by name, `loss` among them.
            **values: numbers, None for one that is not known, or dicts of numbers; those with a
                meaning on the progress line are learning_rate, images_per_second,
                data_wait_percent, memory_gib (added if absent) and skipped.
        """
        if not self._is_writer:
            return
        values = {"memory_gib": peak_memory_gib()} | values
        line = _plain({"samples": samples, "step": step, "terms": terms, **values})
        self._append(line)
        rest = {k: v for k, v in line.items() if k not in ("samples", "terms")}
        self._plot({"terms": line["terms"], "train": rest}, samples)
        self._marks.append((self._clock(), samples))
        print(self._progress(line), flush=True)

    def log_evaluation(self, samples: int, name: str, metrics: dict[str, Any]) -> None:
        """Writes and prints one model's evaluation; one of the same name and place is replaced.

        Args:
            samples: samples seen.
            name: of the evaluated model, such as student.
            metrics: shares in [0, 1], and counts with names that start with num_.
        """
        if not self._is_writer:
            return
        place = {"samples": samples, "evaluation": name}
        self._keep(lambda line: not place.items() <= line.items())
        line = _plain({**place, "metrics": metrics})
        self._append(line)
        self._plot({name: line["metrics"]}, samples)
        self._draw("flush")
        shown = "  ".join(_show_metric(*pair) for pair in flatten(line["metrics"]))
        print(f"evaluation of {name} at {samples:,} samples  {shown}", flush=True)

    def log_image(self, tag: str, array: np.ndarray, samples: int) -> None:
        """Adds a (H, W, 3) uint8 picture to TensorBoard."""
        if self._is_writer:
            self._draw("add_image", tag, array, samples, dataformats="HWC")
            self._draw("flush")
            if self._tracker is not None:
                self._tracker.log_image(tag, array, samples)

    def close(self) -> None:
        if self._is_writer:
            self._draw("close")
            if self._tracker is not None:
                self._tracker.close()

    def _plot(self, values: dict[str, Any], samples: int) -> None:
        numbers = dict(flatten(values))
        for name, value in numbers.items():
            self._draw("add_scalar", name, value, samples)
        if self._tracker is not None:
            self._tracker.log(numbers, samples)

    def _draw(self, method: str, *arguments: Any, **options: Any) -> None:
        """Calls TensorBoard's writer, which can't go on after a write has failed."""
        if self._tensorboard is None:
            return
        try:
            getattr(self._tensorboard, method)(*arguments, **options)
        except OSError as error:
            self._tensorboard = None
            print(f"TensorBoard's file ends here ({error}); the run goes on", flush=True)

    def _append(self, line: dict) -> None:
        """Appends a whole line or none; a full disk costs the line, not the run."""
        with open(self._file, "ab", buffering=0) as file:
            end = file.tell()
            text = f"{json.dumps(line, allow_nan=False)}\n".encode()
            try:
                written = file.write(text)
                if written < len(text):
                    raise OSError(f"{written} of {len(text)} bytes written")
            except OSError as error:
                file.truncate(end)
                print(f"{self._file} lacks a line ({error}); the run goes on", flush=True)

    def _keep(self, wanted: Callable[[dict], bool]) -> None:
        """Rewrites the file without the lines that are not wanted, all at once or not at all."""
        if not self._file.exists():
            return
        lines = self._file.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [text for text in lines if (line := _parse(text)) is not None and wanted(line)]
        if kept == lines:
            return
        write_whole(self._file, "".join(kept).encode())

    def _progress(self, line: dict) -> str:
        step, samples, total = line["step"], line["samples"], self._total_samples
        steps = math.ceil(total * step / samples) if samples else 0
        parts = [f"step {step:,}/{steps:,}", f"{samples:,} samples ({100 * samples / total:.1f} %)"]
        parts += [f"{name} {_show(value, '.4g')}" for name, value in line["terms"].items()]
        for name, form in (
            ("images_per_second", "{:,.4g} img/s"),
            ("data_wait_percent", "data wait {:.0f} %"),
            ("learning_rate", "lr {:.2e}"),
            ("memory_gib", "{:.1f} GiB"),
        ):
            if line.get(name) is not None:
                parts.append(form.format(line[name]))
        num_skipped = sum((line.get("skipped") or {}).values())
        if num_skipped:
            parts.append(f"skipped {num_skipped:,}")
        return "  ".join([*parts, f"ETA {self._remaining(samples, line.get('images_per_second'))}"])

    def _remaining(self, samples: int, images_per_second: float | None) -> str:
        """Time to the end at the pace of the last progress lines, with pauses for evaluation."""
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


def _show_metric(name: str, value: float) -> str:
    return f"{name} {value:,.0f}" if name.startswith("num_") else f"{name} {100 * value:.2f} %"
