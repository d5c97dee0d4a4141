"""The page of an ablation: tables for each keep ratio, differences, curves, and accuracy over FLOPs
with the frontier. It is made of results alone, so that kept ones make it again."""

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from aclip.ablation.cases import QUARTERS
from aclip.ablation.frontier import Point, frontier
from aclip.ablation.results import Mean, Page, Result, difference
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
NUM_COLORS = 10
WIDTH = 7.2
"""The width of the frontier's chart in inches; it may hold many rows."""
LEGEND = (
    "Mean of the seeds ± standard error, of the student, at each quarter of a run. "
    "Object's patches kept: by the mask at the end, in brackets by that before training. "
    "FLOPs and time are those of a run in all its stages, relative to the first row; the time is "
    "that of its steps, waiting for data included. Published: ImageNet-1K zero-shot, ViT-B/16, "
    "YFCC-15M, 25 epochs, half of the patches kept (arXiv:2212.08653)."
)
FRONTIER_LEGEND = (
    "FLOPs of the training so far, the teacher's among them, and the mean accuracy of the seeds "
    "there. The frontier is what no other point beats with as many FLOPs or fewer; rows without a "
    "point on it are pale. Before its end a run has a learning rate that has not come down yet, so "
    "that a shorter run may reach more."
)
SWEEP_LEGEND = (
    "Accuracy at the end of one run at each learning rate, on a seed that the tables do not show; "
    "the rate in brackets was taken. One at the edge of the sweep may not be the best."
)


def write_report(page: Page, out: Path) -> None:
    """Makes a report and writes it into `out`.

    Raises:
        NotWritten: that is not possible.
    """
    write_files(make_report(page), out)


def write_files(files: dict[str, bytes], out: Path) -> None:
    for name, content in files.items():
        write_whole(out / name, content)


def make_report(page: Page) -> dict[str, bytes]:
    """The charts, ablation.json, .html and .md, by their names.

    Args:
        page: with at least one result, some of them with outcomes or rates of a sweep.
    """
    results = page.results
    num_runs = sum(result.num_seeds for result in results)
    num_finished = sum(len(result.outcomes) for result in results)
    blocks: list[Block] = [Text(page.note)] if page.note else []
    if num_finished < num_runs:
        blocks.append(Text(f"{num_finished} of {num_runs} runs are finished."))
    pictures = []
    for keep, group in _by_keep_ratio(results):
        known = [result for result in group if result.outcomes]
        if not known:
            continue
        name = f"{_metric(known)}, %"
        if any(result.keep_ratio is not None for result in group):
            name += f", {keep} % of the patches kept"
        chart = Picture(name, draw_chart(_curves(known), y_label=name), f"accuracy-keep{keep}.png")
        pictures.append(chart)
        blocks += [Heading(name), _table(group)]
        if len(known) > 1:
            blocks.append(Text(_order(known)))
        differences = _differences(known)
        if differences.rows:
            blocks.append(differences)
        blocks.append(Gallery([chart], 480))
    known = [result for result in results if result.outcomes]
    if known:
        blocks.append(Text(LEGEND))
        picture = _frontier(known, blocks)
        pictures.append(picture)
    swept = [result for result in results if result.rates]
    if swept:
        blocks += [Heading("Learning rates"), _sweep(swept), Text(SWEEP_LEGEND)]
    return {
        **{picture.file: picture.content for picture in pictures},
        FIGURES: page.to_json(),
        PAGE: to_html(page.title, blocks).encode(),
        MARKDOWN: to_markdown(page.title, blocks).encode(),
    }


def _metric(results: list[Result]) -> str:
    return SHARES[next(iter(results[0].outcomes.values())).metric]


def _by_keep_ratio(results: list[Result]) -> Iterator[tuple[str, list[Result]]]:
    """The kept percentage and its rows, those that keep everything among them."""
    ratios = {r.keep_ratio for r in results if r.keep_ratio is not None}
    for ratio in sorted(ratios, reverse=True) or [None]:
        group = [r for r in results if r.keep_ratio in (None, ratio)]
        yield "100" if ratio is None else f"{100 * ratio:g}", group


def _table(group: list[Result]) -> Table:
    header = ["", *QUARTER_TITLES, "object's patches kept", "samples", "FLOPs", "time", "published"]
    first = group[0]
    rows = []
    for result in group:
        accuracy = [_show(mean) for mean in result.accuracy()] or [""] * QUARTERS
        objects = result.objects()
        seconds, of_first = result.seconds(), first.seconds()
        num_seeds = f"{len(result.outcomes)}"
        if len(result.outcomes) < result.num_seeds:
            num_seeds += f" of {result.num_seeds}"
        rows.append(
            (
                result.label,
                *accuracy,
                f"{_show(objects[1])} ({_show(objects[0])})" if objects else "",
                f"{result.samples[-1]:,}",
                f"{result.flops[-1] / first.flops[-1]:.2f}",
                f"{seconds / of_first:.2f}" if seconds and of_first else "",
                _published(result),
                num_seeds,
            )
        )
    return Table([*header, "seeds"], rows)


def _order(group: list[Result]) -> str:
    """The order of the rows by accuracy at the end, beside the published order if it is known."""
    ends = sorted(group, key=lambda result: -result.accuracy()[-1].value)
    signs = [_sign(better, worse) for better, worse in pairwise(ends)]
    here = ends[0].label
    here += "".join(f" {sign} {row.label}" for sign, row in zip(signs, ends[1:], strict=True))
    if ALIKE in signs:
        here += f" ({ALIKE}: less than two standard errors apart, or too few seeds to say)"
    if not all(_published(result) for result in group):
        return f"Order at the end: {here}."
    published = sorted(group, key=lambda result: -result.published)
    if ends == published and ALIKE not in signs:
        return f"At the end the order is the published one: {here}."
    there = " > ".join(result.label for result in published)
    return f"Order at the end: {here}. Published: {there}."


def _sign(better: Result, worse: Result) -> str:
    """`>` where the difference at the end, seed by seed, is more than two standard errors."""
    means = difference(better, worse)
    # The error of one seed is NaN, which no comparison holds for.
    return ">" if means and means[-1].value > 2 * means[-1].error else ALIKE


def _published(result: Result) -> str:
    """The published accuracy; empty for a keep ratio that the paper does not report."""
    known = result.keep_ratio in PUBLISHED_RATIOS and result.published is not None
    return f"{result.published:.1f}" if known else ""


def _differences(group: list[Result]) -> Table:
    by_row = {result.row: result for result in group}
    rows = []
    of_rows = [(result.row, result.against) for result in group]
    for better, worse in dict.fromkeys((*COMPARED, *of_rows)):
        if better in by_row and worse in by_row:
            means = difference(by_row[better], by_row[worse])
            label = f"{by_row[better].label} - {by_row[worse].label}"
            if means:
                rows.append((label, *(_show(mean, "+") for mean in means)))
    return Table(["difference, seed by seed", *QUARTER_TITLES], rows)


def _name(result: Result, results: list[Result]) -> str:
    """Its label, with what is kept, or its row, where other results have that label too."""
    if sum(other.label == result.label for other in results) == 1:
        return result.label
    kept = result.row if result.keep_ratio is None else f"{100 * result.keep_ratio:g} %"
    return f"{result.label}, {kept}"


def _curves(group: list[Result]) -> list[Line]:
    lines = []
    for color, result in enumerate(group):
        means = result.accuracy()
        lines.append(
            Line(
                _name(result, group),
                result.samples[1:],
                [100 * mean.value for mean in means],
                color,
                dashed=color >= NUM_COLORS,
                errors=[100 * mean.error for mean in means],
            )
        )
    return lines


def _frontier(results: list[Result], blocks: list[Block]) -> Picture:
    """Adds the frontier's table and chart to the page; returns the chart."""
    points = frontier(
        Point(_name(result, results), flops, mean.value)
        for result in results
        for flops, mean in zip(result.flops[1:], result.accuracy(), strict=True)
    )
    on_it = {point.row for point in points}
    lines = [
        replace(line, samples=result.flops[1:], faded=line.label not in on_it)
        for line, result in zip(_curves(results), results, strict=True)
    ]
    flops = [*(point.flops for point in points), max(result.flops[-1] for result in results)]
    best = [100 * point.accuracy for point in points]
    lines.append(Line("frontier", flops, [*best, best[-1]], None, dashed=True, in_steps=True))
    accuracy = f"{_metric(results)}, %"
    name = f"{accuracy}, over FLOPs"
    content = draw_chart(lines, x_label="FLOPs of training", y_label=accuracy, width=WIDTH)
    chart = Picture(name, content, "frontier.png")
    rows = [(each.row, f"{each.flops:.3g}", f"{100 * each.accuracy:.1f}") for each in points]
    table = Table(["frontier", "FLOPs", _metric(results)], rows)
    blocks += [Heading(name), table, Gallery([chart], 800), Text(FRONTIER_LEGEND)]
    return chart


def _sweep(results: list[Result]) -> Table:
    rates = sorted({rate for result in results for rate in result.rates})

    def cell(result: Result, rate: float) -> str:
        if rate not in result.rates:
            return ""
        value = result.rates[rate]
        text = "not finite" if math.isnan(value) else f"{100 * value:.1f}"
        return f"[{text}]" if rate == result.rate else text

    rows = [(_name(r, results), *(cell(r, rate) for rate in rates)) for r in results]
    return Table(["learning rate", *(f"{rate:g}" for rate in rates)], rows)


def _show(mean: Mean, sign: str = "") -> str:
    error = "" if math.isnan(mean.error) else f" ± {100 * mean.error:.1f}"
    return f"{100 * mean.value:{sign}.1f}{error}"
