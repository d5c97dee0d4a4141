"""Results as a table, as Markdown and as JSON, with the published row beside ours."""

import json
import math
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import yaml

from aclip.cli import text_table
from aclip.evaluation.sets.catalog import catalog, is_retrieval
from aclip.evaluation.sets.task import Task
from aclip.reports.document import Table, Text, to_markdown

METRICS = {
    "top1": "top-1",
    "mean_per_class": "mean per class",
    "mean_top1_top5": "mean of top-1 and top-5",
    "roc_auc": "ROC AUC",
}
DIRECTIONS = {"image_to_text": "image to text", "text_to_image": "text to image"}
RECALLS = (1, 5, 10)


@dataclass(frozen=True)
class Row:
    """A line of the table; `ours` and `published` are percent, or None."""

    title: str
    metric: str
    num_samples: int
    ours: float | None
    published: float | None


@cache
def published_results() -> dict[str, dict[str, Any]]:
    """By name: `title`, `average`, and each set's result in percent; a retrieval set has R@1 in
    both directions."""
    text = (resources.files("aclip.evaluation") / "published.yaml").read_text(encoding="utf-8")
    columns = [name for name in catalog() if not is_retrieval(name)]
    results = {}
    for name, values in yaml.safe_load(text).items():
        by_set = dict(zip(columns, values.pop("classification"), strict=True))
        results[name] = values | by_set
    return results


def headline(metric: str, metrics: dict[str, float], kind: str = "zero_shot") -> float | None:
    """A set's own metric in percent, of zero-shot or of the linear_probe; None if undefined."""
    if metric == "mean_top1_top5":
        return 50 * (metrics[f"{kind}_top1"] + metrics[f"{kind}_top5"])
    value = metrics.get(f"{kind}_{metric}")
    return None if value is None else 100 * value


def make_rows(results: list[tuple[Task, dict[str, float]]], published: str) -> list[Row]:
    """The lines of the table; an average where all classification sets of the papers are there."""
    theirs = published_results()[published]
    rows, classified = [], {}
    for task, metrics in results:
        num_samples = int(metrics["num_images"])
        if "zero_shot_top1" in metrics:
            ours = headline(task.metric, metrics)
            metric = METRICS[task.metric]
            rows.append(Row(task.title, metric, num_samples, ours, theirs.get(task.name)))
            classified[task.name] = ours
        if "linear_probe_top1" in metrics:
            probe = headline(task.metric, metrics, "linear_probe")
            metric = f"linear probe, {METRICS[task.metric]}"
            rows.append(Row(task.title, metric, num_samples, probe, None))
        for side, (direction, words) in enumerate(DIRECTIONS.items()):
            for k in RECALLS if f"{direction}_r1" in metrics else ():
                pair = theirs.get(task.name) if k == 1 else None
                ours = 100 * metrics[f"{direction}_r{k}"]
                other = pair[side] if pair else None
                rows.append(Row(task.title, f"{words} R@{k}", num_samples, ours, other))
    columns = [name for name in catalog() if not is_retrieval(name)]
    if all(classified.get(name) is not None for name in columns):
        mean = math.fsum(classified[name] for name in columns) / len(columns)
        num_samples = sum(int(m["num_images"]) for t, m in results if t.name in columns)
        rows.append(Row(f"average of {len(columns)}", "", num_samples, mean, theirs["average"]))
    return rows


def table(rows: list[Row], published: str) -> str:
    """The rows as a text table."""
    return text_table(_cells(rows, published), left=(0, 1))


def markdown(heading: str, rows: list[Row], published: str, facts: list[str]) -> str:
    header, *lines = _cells(rows, published)
    return to_markdown(
        heading, [Table(header, lines), Text("\n".join(f"- {fact}" for fact in facts))]
    )


def _cells(rows: list[Row], published: str) -> list[list[str]]:
    """The header and the lines; without a published number no column for them."""
    title = published_results()[published]["title"]
    header = ["set", "metric", "images", "ours", f"published: {title}"]
    lines = [
        [row.title, row.metric, f"{row.num_samples:,}", _percent(row.ours), _percent(row.published)]
        for row in rows
    ]
    width = len(header) if any(row.published is not None for row in rows) else len(header) - 1
    return [line[:width] for line in (header, *lines)]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def to_json(values: dict) -> str:
    return json.dumps(values, indent=2, allow_nan=False) + "\n"
