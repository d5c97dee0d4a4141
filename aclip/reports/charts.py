"""Curves over samples as small PNG charts, readable on a narrow page."""

import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

SIZE, DPI = (4.4, 2.8), 120  # inches
MAX_LEGEND_INSIDE = 4
LEGEND_ROW = 0.2  # inches
LABEL_PER_INCH = 6
"""Characters of a label, two of which stand beside each other, on each inch of the chart."""
MAX_MARKED = 20
"""Curves of fewer points show them: a single one would draw no line."""


@dataclass(frozen=True)
class Line:
    """A curve over samples, or what else the chart's x axis shows; a value is None where it is
    unknown or not finite. `color` counts from 0, None is black; `errors` are the lengths of the
    bars around the points. A curve in steps keeps each value up to the next one; a faded one steps
    back behind the others."""

    label: str
    samples: Sequence[float]
    values: Sequence[float | None]
    color: int | None
    dashed: bool = False
    errors: Sequence[float] | None = None
    in_steps: bool = False
    faded: bool = False


def draw_chart(
    lines: list[Line],
    marks: Iterable[int] = (),
    x_label: str = "samples",
    y_label: str = "",
    width: float = SIZE[0],
) -> bytes:
    """A PNG of the curves, with a legend where there are several: above them if it is long.

    Args:
        marks: samples at which a thin vertical line is drawn.
        x_label, y_label: what the axes show; the y axis may leave that to the chart's title.
        width: in inches.
    """
    plot_height = SIZE[1] * (width / SIZE[0])
    longest = max((len(line.label) for line in lines), default=0)
    columns = 2 if longest <= LABEL_PER_INCH * width else 1
    legend_rows = math.ceil(len(lines) / columns) if len(lines) > MAX_LEGEND_INSIDE else 0
    height = plot_height + LEGEND_ROW * legend_rows
    figure = Figure(figsize=(width, height), dpi=DPI)
    canvas = FigureCanvasAgg(figure)
    # Room for seven digits; a layout that measures the text takes twice the time.
    share = plot_height / height
    axes = figure.add_axes((0.17, 0.18 * share, 0.8, 0.78 * share))
    for line in lines:
        axes.errorbar(
            line.samples,
            [float("nan") if value is None else value for value in line.values],
            line.errors,
            fmt="--" if line.dashed else "-",
            capsize=2,
            marker="o" if len(line.values) < MAX_MARKED else "",
            markersize=3,
            color="black" if line.color is None else f"C{line.color}",
            alpha=0.35 if line.faded else 1,
            label=line.label,
            drawstyle="steps-post" if line.in_steps else "default",
        )
    for samples in marks:
        axes.axvline(samples, color="0.5", linewidth=0.8, linestyle=":")
    axes.grid(alpha=0.3)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.locator_params(nbins=5)
    if len(lines) > 1:
        above = {
            "loc": "lower right",
            "bbox_to_anchor": (1.02, 1),
            "ncols": columns,
            "frameon": False,
        }
        legend = axes.legend(fontsize=8, **(above if legend_rows else {}))
        for text in legend.get_texts():
            text.set_parse_math(False)
    buffer = io.BytesIO()
    canvas.print_png(buffer)
    return buffer.getvalue()
