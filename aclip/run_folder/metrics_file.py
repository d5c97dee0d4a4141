"""metrics.jsonl: read whole, and its values by name."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aclip.run_folder.layout import METRICS_FILE


def read_metrics(run_folder: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl, without one that a killed process left unfinished."""
    text = (run_folder / METRICS_FILE).read_text(encoding="utf-8")
    lines = (_parse(line) for line in text.splitlines(keepends=True))
    return [line for line in lines if line is not None]


def flatten(values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Values by name, `skipped/no_image` for one of a dict; what is None is left out."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from ((f"{name}/{key}", number) for key, number in flatten(value))
        elif value is not None:
            yield name, value


def _parse(text: str) -> dict | None:
    """A line of metrics.jsonl, or None for one that a killed process left unfinished."""
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if text.endswith("\n") and isinstance(line, dict) and "samples" in line else None
