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
from aclip.run_folder.results_file import DIRECTIONS, scores


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


def make_rows(results: list[tuple[Task, dict[str, float]]], published: str) -> list[Row]:
    """The lines of the table; an average where all classification sets of the papers are there."""
    theirs = published_results()[published]
    rows, classified = [], {}
    for task, metrics in results:
        num_samples, other = int(metrics["num_images"]), theirs.get(task.name)
        for score in scores(task.metric, metrics):
            beside = None
            if score.kind == "zero_shot":
                classified[task.name], beside = score.percent, other
            elif score.k == 1 and other:
                beside = other[list(DIRECTIONS).index(score.kind)]
            rows.append(Row(task.title, score.words, num_samples, score.percent, beside))
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
