"""The report of a run, or of several side by side: report.html and report.md.

Everything in it is read from the run's folder, so that it can be made at any time, by anybody.
"""

import argparse
import io
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

from PIL import Image

from aclip.errors import ConfigError
from aclip.files import check_writable, write_whole
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
from aclip.reports.recipes import recipe_blocks, recipe_changes_at
from aclip.run_folder.layout import (
    METRICS_FILE,
    RECIPE_FILE,
    REPORT_CHARTS_FOLDER,
    REPORT_MARKDOWN,
    REPORT_PAGE,
    latest_record,
    picture_path,
)
from aclip.run_folder.metrics_file import EvaluationLine, StepLine, flatten, read_metrics

MAX_PICTURES = 6
"""Kept-patch pictures of a run that a page shows, the first and the last among them."""
PICTURE_WIDTH = 640
"""Below this the words in a kept-patch picture can't be read."""
SHARES = {
    "zero_shot_top1": "Zero-shot accuracy",
    "image_to_text_r1": "Image-to-text R@1",
    "text_to_image_r1": "Text-to-image R@1",
    "object_patches_kept": "Object's patches kept",
    "attention_kept": "Attention kept",
    "agreement": "Agreement with the mask before",
}
"""Shares of an evaluation that curves and the table show, if there are any."""
LOSSES = {
    "loss_kept": "Loss on the most attended",
    "loss_dropped": "Loss on the least attended",
}
"""Losses of an evaluation that curves and the table show, if there are any."""
LOGGED = {
    "images_per_second": ("Images per second", "{:,.1f}"),
    "data_wait_percent": ("Data wait, %", "{:.1f}"),
    "memory_gib": ("Memory of rank 0, GiB", "{:.2f}"),
    "learning_rate": ("Learning rate", "{:.3e}"),
    "momentum": ("EMA momentum", "{:.6f}"),
    "taught": ("Samples that the teacher scored", "{:.0%}"),
    "keep_ratio": ("Share of the blocks kept", "{:.1%}"),
}
"""Numbers of a StepLine: title and format."""


@dataclass(frozen=True)
class RunRecord:
    """What a run folder says.

    Attributes:
        name: how pages call the run.
        steps, evaluations: lines of metrics.jsonl.
        recipe: the resolved recipe as YAML, of the last stage.
        first_recipe: that of the first stage, with those that follow.
        changes: from where on it was which one, by the samples seen before.
        pictures: the pictures of kept patches, by samples seen.
    """

    name: str
    steps: list[StepLine]
    evaluations: list[EvaluationLine]
    recipe: str
    first_recipe: str
    changes: dict[int, str]
    pictures: dict[int, Path]


def report(arguments: argparse.Namespace) -> None:
    """Runs `launch/report.py` with its parsed arguments.

    Raises:
        ConfigError: a folder is no run's, or --out can't be written.
    """
    folders = [Path(folder) for folder in arguments.runs]
    default = folders[0] if len(folders) == 1 else Path("comparison")
    out = Path(arguments.out) if arguments.out else default
    for folder in folders:
        _check_run(folder)
    check_writable(out, "--out")
    write_report(folders, out)
    print(f"wrote {out / REPORT_PAGE} and {out / REPORT_MARKDOWN}", flush=True)


def write_report(folders: list[Path], out: Path) -> None:
    """Writes report.html, report.md and its charts about one run or several into `out`.

    Raises:
        ConfigError: a folder holds no metrics or no recipe.
        NotWritten: `out` can't be written.
    """
    runs = [_read(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]
    marks = {samples for run in runs for samples in run.changes}
    changes = _notes(runs, "Recipe", lambda run: list(run.changes.values()))
    charts = [
        Picture(title, draw_chart(lines, marks), f"{REPORT_CHARTS_FOLDER}/{name}.png")
        for name, title, lines in _curves(runs)
        if lines
    ]
    blocks: list[Block] = [Gallery(charts, 340), *changes]
    if any(run.evaluations for run in runs):
        blocks += [Heading("Evaluations"), _evaluations(runs), *_notes(runs, "Warning", _warned)]
    pictures = list(_pictures(runs, out))
    if pictures:
        blocks += [Heading("Kept patches"), Gallery(pictures, 1000, PICTURE_WIDTH)]
    blocks += [
        Heading("Latest values"),
        _latest(runs),
        *recipe_blocks({run.name: (run.recipe, run.first_recipe) for run in runs}),
    ]
    title = f"Run {runs[0].name}" if len(runs) == 1 else f"{len(runs)} runs"
    for chart in charts:
        write_whole(out / chart.file, chart.content)
    write_whole(out / REPORT_PAGE, to_html(title, blocks).encode())
    write_whole(out / REPORT_MARKDOWN, to_markdown(title, blocks).encode())


def _names(folders: list[Path]) -> list[str]:
    """The folders' own names, or their paths where two are called alike."""
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def _check_run(folder: Path) -> None:
    for path in (folder / METRICS_FILE, folder / RECIPE_FILE):
        if not path.is_file():
            found = f"holds no {path.name}"
            if not folder.is_dir():
                found = "is a file" if folder.exists() else "does not exist"
            raise ConfigError(
                f"RUN is {folder}, which {found}; give the folder of a run, as --output of "
                "launch/pretrain.py named it"
            )


def _read(folder: Path, name: str) -> RunRecord:
    _check_run(folder)
    metrics = read_metrics(folder)
    # A run that began anew leaves pictures whose evaluations metrics.jsonl holds no more.
    paths = {line.samples: picture_path(folder, line.samples) for line in metrics.evaluations}
    return RunRecord(
        name,
        metrics.steps,
        metrics.evaluations,
        latest_record(folder, RECIPE_FILE).read_text(),
        (folder / RECIPE_FILE).read_text(),
        recipe_changes_at(folder),
        {samples: path for samples, path in paths.items() if path.is_file()},
    )


def _latest(runs: list[RunRecord]) -> Table:
    """Last log step and last evaluation, a column for each run."""
    latest = [_latest_values(run) for run in runs]
    names = dict.fromkeys(name for values in latest for name in values)
    rows = [(name, *(values.get(name, "") for values in latest)) for name in names]
    return Table(("", *(run.name for run in runs)), rows)


def _latest_values(run: RunRecord) -> dict[str, str]:
    values = {}
    if run.steps:
        last = run.steps[-1]
        values |= {"samples": f"{last.samples:,}", "step": f"{last.step:,}"}
        values |= {_term(name): _show(v, "{:.4f}") for name, v in last.terms.items()}
        for name, (title, form) in LOGGED.items():
            number = getattr(last, name)
            if number is not None:
                values[title] = form.format(number)
        counts = {"skipped": last.skipped, "repeated": last.repeated or None, "noted": last.noted}
        values |= {name: f"{number:,}" for name, number in flatten(counts)}
    for line in run.evaluations:
        if line.samples == run.evaluations[-1].samples:
            for metric, value in line.metrics.items():
                values[f"{line.evaluation} {metric}"] = _show_metric(metric, value)
    return values


def _evaluations(runs: list[RunRecord]) -> Table:
    lines = [(run.name, line) for run in runs for line in run.evaluations]
    titles = SHARES | LOSSES
    shown = [name for name in titles if any(name in line.metrics for _, line in lines)]
    rows = []
    for run, line in lines:
        prefix = [run] if len(runs) > 1 else []
        cells = [_show_metric(name, line.metrics.get(name)) for name in shown]
        rows.append([*prefix, f"{line.samples:,}", line.evaluation, *cells])
    first = ["run"] if len(runs) > 1 else []
    return Table([*first, "samples", "model", *(titles[name] for name in shown)], rows)


def _notes(runs: list[RunRecord], kind: str, found: Callable[[RunRecord], list[str]]) -> list[Text]:
    """What pages say of runs in sentences, each with its kind and, of several runs, the run."""
    places = [(f"{kind} of {run.name}" if len(runs) > 1 else kind, run) for run in runs]
    return [Text(f"{place} {text}.") for place, run in places for text in found(run)]


def _warned(run: RunRecord) -> list[str]:
    lines = [line for line in run.evaluations if line.warning]
    return [f"at {line.samples:,} samples: {line.warning}" for line in lines]


def _term(name: str) -> str:
    return "Loss" if name == "loss" else f"Loss term {name}"


def _show(value: float | None, form: str) -> str:
    return "not finite" if value is None else form.format(value)


def _show_metric(name: str, value: float | None) -> str:
    if value is None:
        return ""
    if name.startswith("loss_"):
        return f"{value:.4f}"
    return f"{value:,.0f}" if name.startswith("num_") else f"{100 * value:.2f} %"


def _curves(runs: list[RunRecord]) -> Iterator[tuple[str, str, list[Line]]]:
    """File name, title and lines of each chart that has something to show."""
    terms = dict.fromkeys(name for run in runs for line in run.steps for name in line.terms)
    for name in terms:
        lines = _over_steps(runs, lambda line, name=name: line.terms.get(name))
        yield f"term-{name}", _term(name), lines
    for metric, title in SHARES.items():
        yield metric, f"{title}, %", _over_evaluations(runs, metric, scale=100)
    for metric, title in LOSSES.items():
        yield metric, title, _over_evaluations(runs, metric, scale=1)
    for name, (title, _) in LOGGED.items():
        yield name, title, _over_steps(runs, attrgetter(name))


def _over_steps(runs: list[RunRecord], number: Callable[[StepLine], float | None]) -> list[Line]:
    lines = []
    for color, run in enumerate(runs):
        values = [number(line) for line in run.steps]
        if any(value is not None for value in values):
            lines.append(Line(run.name, [line.samples for line in run.steps], values, color))
    return lines


def _over_evaluations(runs: list[RunRecord], metric: str, scale: int) -> list[Line]:
    lines = []
    for color, run in enumerate(runs):
        for model in dict.fromkeys(line.evaluation for line in run.evaluations):
            chosen = [line for line in run.evaluations if line.evaluation == model]
            points = [
                (line.samples, scale * line.metrics[metric])
                for line in chosen
                if line.metrics.get(metric) is not None
            ]
            if points:
                label = model if len(runs) == 1 else f"{run.name} {model}"
                lines.append(Line(label, *zip(*points, strict=True), color, model == "teacher"))
    return lines


def _pictures(runs: list[RunRecord], out: Path) -> Iterator[Picture]:
    """The pictures of one run over time, or the latest of each of several runs."""
    for run in runs:
        every = list(run.pictures.items())
        if len(runs) == 1 and len(every) > MAX_PICTURES:
            last = len(every) - 1
            chosen = [every[round(i * last / (MAX_PICTURES - 1))] for i in range(MAX_PICTURES)]
        else:
            chosen = every if len(runs) == 1 else every[-1:]
        for samples, path in chosen:
            buffer = io.BytesIO()
            with Image.open(path) as image:
                image.save(buffer, "WEBP", quality=85)
            name = "" if len(runs) == 1 else f"{run.name} "
            file = os.path.relpath(path, out)
            yield Picture(f"{name}at {samples:,} samples", buffer.getvalue(), file)
