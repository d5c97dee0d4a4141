"""The page of an ablation: tables for each keep ratio, differences, curves."""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

from aclip.ablation.cases import QUARTERS
from aclip.ablation.results import Mean, Result, difference
from aclip.files import write_whole
from aclip.reports.charts import Line, draw_chart
from aclip.reports.document import (
    Block,
    Gallery,
    Heading,
    Picture,
    Table,
    Text,
    to_html,
    to_markdown,
)
from aclip.reports.report import SHARES

PAGE, MARKDOWN, FIGURES = "ablation.html", "ablation.md", "ablation.json"
COMPARED = (
    ("attentive_1x", "random_1x"),
    ("attentive_2x", "random_2x"),
    ("attentive_2x", "inverse_2x"),
    ("random_2x", "inverse_2x"),
    ("aclip", "attentive_2x"),
    ("aclip", "slip"),
)
"""Rows whose difference is shown, the one that should be better first; beside Row.against."""
QUARTER_TITLES = [f"{100 * quarter // QUARTERS} %" for quarter in range(1, QUARTERS + 1)]
PUBLISHED_RATIOS = (None, 0.5)
ALIKE = "~"
"""Stands between two rows that the seeds can't tell apart."""
LEGEND = (
    "Mean of the seeds ± standard error, of the student, at each quarter of a run. "
    "Object's patches kept: by the mask at the end, in brackets by that before training. "
    "FLOPs and time are those of a run in all its stages, relative to the first row; the time is "
    "that of its steps, waiting for data included. Published: ImageNet-1K zero-shot, ViT-B/16, "
    "YFCC-15M, 25 epochs, half of the patches kept (arXiv:2212.08653)."
)


def write_report(results: list[Result], title: str, out: Path) -> None:
    """Makes a report and writes it into `out`.

    Raises:
        NotWritten: that is not possible.
    """
    write_files(make_report(results, title), out)


def write_files(files: dict[str, bytes], out: Path) -> None:
    for name, content in files.items():
        write_whole(out / name, content)


def make_report(results: list[Result], title: str) -> dict[str, bytes]:
    """The charts, ablation.json, .html and .md, by their names.

    Args:
        results: at least one.
        title: the page's title.
    """
    blocks: list[Block] = []
    pictures = []
    for keep, group in _by_keep_ratio(results):
        metric = next(iter(group[0].outcomes.values())).metric
        name = f"{SHARES[metric]}, %, {keep} % of the patches kept"
        chart = Picture(name, draw_chart(_curves(group)), f"accuracy-keep{keep}.png")
        pictures.append(chart)
        blocks += [Heading(name), _table(group)]
        if len(group) > 1:
            blocks.append(Text(_order(group)))
        differences = _differences(group)
        if differences.rows:
            blocks.append(differences)
        blocks.append(Gallery([chart], 480))
    blocks.append(Text(LEGEND))
    return {
        **{picture.file: picture.content for picture in pictures},
        FIGURES: _json(results),
        PAGE: to_html(title, blocks).encode(),
        MARKDOWN: to_markdown(title, blocks).encode(),
    }


def _by_keep_ratio(results: list[Result]) -> Iterator[tuple[str, list[Result]]]:
    """The kept percentage and its rows, those that keep everything among them."""
    ratios = {r.case.keep_ratio for r in results if r.case.keep_ratio is not None}
    for ratio in sorted(ratios, reverse=True) or [None]:
        group = [r for r in results if r.case.keep_ratio in (None, ratio)]
        yield "100" if ratio is None else f"{100 * ratio:g}", group


def _table(group: list[Result]) -> Table:
    header = ["", *QUARTER_TITLES, "object's patches kept", "FLOPs", "time", "published", "seeds"]
    first = group[0]
    rows = []
    for result in group:
        objects = result.objects()
        rows.append(
            (
                result.case.label,
                *(_show(mean) for mean in result.accuracy()),
                f"{_show(objects[1])} ({_show(objects[0])})" if objects else "",
                f"{result.case.flops[-1] / first.case.flops[-1]:.2f}",
                f"{result.seconds() / first.seconds():.2f}",
                _published(result),
                str(len(result.outcomes)),
            )
        )
    return Table(header, rows)


def _order(group: list[Result]) -> str:
    """The order of the rows by accuracy at the end, beside the published order if it is known."""
    ends = sorted(group, key=lambda result: -result.accuracy()[-1].value)
    signs = [_sign(better, worse) for better, worse in pairwise(ends)]
    here = ends[0].case.label
    here += "".join(f" {sign} {row.case.label}" for sign, row in zip(signs, ends[1:], strict=True))
    if ALIKE in signs:
        here += f" ({ALIKE}: less than two standard errors apart, or too few seeds to say)"
    if not all(_published(result) for result in group):
        return f"Order at the end: {here}."
    published = sorted(group, key=lambda result: -result.case.row.published)
    if ends == published and ALIKE not in signs:
        return f"At the end the order is the published one: {here}."
    there = " > ".join(result.case.label for result in published)
    return f"Order at the end: {here}. Published: {there}."


def _sign(better: Result, worse: Result) -> str:
    """`>` where the difference at the end, seed by seed, is more than two standard errors."""
    means = difference(better, worse)
    # The error of one seed is NaN, which no comparison holds for.
    return ">" if means and means[-1].value > 2 * means[-1].error else ALIKE


def _published(result: Result) -> str:
    """The published accuracy; empty for a keep ratio that the paper does not report."""
    known = result.case.keep_ratio in PUBLISHED_RATIOS and result.case.row.published is not None
    return f"{result.case.row.published:.1f}" if known else ""


def _differences(group: list[Result]) -> Table:
    by_row = {result.case.row.name: result for result in group}
    rows = []
    of_rows = [(r.case.row.name, r.case.row.against) for r in group]
    for better, worse in dict.fromkeys((*COMPARED, *of_rows)):
        if better in by_row and worse in by_row:
            means = difference(by_row[better], by_row[worse])
            label = f"{by_row[better].case.label} - {by_row[worse].case.label}"
            if means:
                rows.append((label, *(_show(mean, "+") for mean in means)))
    return Table(["difference, seed by seed", *QUARTER_TITLES], rows)


def _curves(group: list[Result]) -> list[Line]:
    lines = []
    for color, result in enumerate(group):
        means = result.accuracy()
        lines.append(
            Line(
                result.case.label,
                next(iter(result.outcomes.values())).samples[1:],
                [100 * mean.value for mean in means],
                color,
                errors=[100 * mean.error for mean in means],
            )
        )
    return lines


def _json(results: list[Result]) -> bytes:
    rows = [
        {
            "row": result.case.row.name,
            "keep_ratio": result.case.keep_ratio,
            "overrides": result.case.overrides,
            "flops": result.case.flops,
            "seeds": {seed: asdict(outcome) for seed, outcome in result.outcomes.items()},
        }
        for result in results
    ]
    return json.dumps(rows, indent=1).encode()


def _show(mean: Mean, sign: str = "") -> str:
    error = "" if math.isnan(mean.error) else f" ± {100 * mean.error:.1f}"
    return f"{100 * mean.value:{sign}.1f}{error}"
