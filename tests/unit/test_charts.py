"""Charts: what a reader must be able to see of them."""

import io

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from aclip.reports.charts import SIZE, Line, draw_chart


@pytest.mark.parametrize("length", [5, 26, 27, 45])
@pytest.mark.parametrize("width", [SIZE[0], 8.0])
def test_a_long_legend_shows_every_line_in_its_colour(length, width):
    """Above the axes, and none of it cut off at the left edge."""
    label = "attentive after a quarter of the run, "[:length].ljust(length, "5")
    lines = [Line(label, [1, 2], [0, 1], index) for index in range(7)]
    pixels = np.asarray(Image.open(io.BytesIO(draw_chart(lines, width=width))).convert("RGB"))
    top = pixels[: int(0.2 * 120)]  # the first row of the legend
    assert (top[:, 0] == 255).all()
    cycle = matplotlib.rcParams["axes.prop_cycle"].by_key()["color"]
    above = pixels[: pixels.shape[0] - int(0.96 * SIZE[1] * (width / SIZE[0]) * 120)]
    for index in range(7):
        colour = np.round(255 * np.array(to_rgb(cycle[index])))
        near = (np.abs(above.astype(int) - colour) <= 2).all(-1)
        assert near.any(), f"line {index} has no handle in the legend"
