"""The pages in headless Chromium: no console error, images there, readable at 1280 and 400 px."""

import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from ablation_runs import finished_runs
from report_run import write_run

from aclip.ablation.report import write_report as write_ablation
from aclip.ablation.results import Page, read_results
from aclip.reports.document import Gallery, Heading, Picture, Table, Text, to_html
from aclip.reports.mask_pictures import encode
from aclip.reports.report import write_report

BROWSERS = ("chromium", "chromium-headless-shell", "chromium-browser", "google-chrome")
BROWSER = next((path for name in BROWSERS if (path := shutil.which(name))), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        BROWSER is None, reason=f"none of {', '.join(BROWSERS)} is installed (apt install chromium)"
    ),
]
# The page lies in frames of the two widths, whose measures end as text in the outer page.
OUTER = """<!doctype html><link rel="icon" href="data:,"><pre id="result"></pre>
<iframe width="1280" height="900" srcdoc="{page}"></iframe>
<iframe width="400" height="900" srcdoc="{page}"></iframe>
<script>
addEventListener("load", () => {{
  const measures = [...document.querySelectorAll("iframe")].map((frame) => {{
    const page = frame.contentDocument, root = page.documentElement;
    const visible = (e) => e.getBoundingClientRect().width > 0;
    return {{
      width: frame.clientWidth,
      scroll_width: root.scrollWidth,
      images: [...page.images].map((i) => [i.naturalWidth, i.getBoundingClientRect().width]),
      font_sizes: [...page.querySelectorAll("p, td, th, figcaption, pre, h1, h2")]
        .filter(visible).map((e) => parseFloat(frame.contentWindow.getComputedStyle(e).fontSize)),
      wide: [...page.querySelectorAll("p, pre, h1, h2, .wide, .gallery, figure")]
        .filter((e) => e.getBoundingClientRect().right > frame.clientWidth).map((e) => e.tagName),
    }};
  }});
  document.getElementById("result").textContent = JSON.stringify(measures);
}});
</script>"""


def measure(page, folder):
    """Measures at 1280 and at 400 px, and what the console said."""
    file = folder / "outer.html"
    file.write_text(OUTER.format(page=html.escape(page)))
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    command += ["--window-size=1800,1000", f"--user-data-dir={folder / 'profile'}"]
    command += ["--virtual-time-budget=5000", "--dump-dom", file.as_uri()]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=60)
    result = re.search(r'<pre id="result">(.*?)</pre>', finished.stdout, re.DOTALL)
    assert result is not None and result[1], finished.stderr
    console = [line for line in finished.stderr.splitlines() if ":CONSOLE" in line]
    return json.loads(html.unescape(result[1])), console


def check(page, folder, num_images):
    measures, console = measure(page, folder)
    assert console == []
    assert [m["width"] for m in measures] == [1280, 400]
    for m in measures:
        assert m["scroll_width"] <= m["width"] and m["wide"] == []
        assert len(m["images"]) == num_images
        assert all(natural > 0 and shown >= 100 for natural, shown in m["images"])
        assert min(m["font_sizes"]) >= 13
    return measures


@pytest.fixture
def written_run(tmp_path):
    return write_run(tmp_path / "run")


def test_report_of_a_run(tmp_path, written_run):
    write_report([written_run], written_run)
    page = (written_run / "report.html").read_text()
    wide, narrow = check(page, tmp_path, num_images=11)
    assert narrow["images"][0][1] > 330  # a chart fills the narrow page
    assert wide["images"][0][1] < 640 and wide["images"][-1][1] > 900


def test_comparison_of_runs(tmp_path, written_run):
    other = tmp_path / "another-run-with-a-rather-long-name-of-its-own"
    shutil.copytree(written_run, other)
    write_report([written_run, other], tmp_path)
    check((tmp_path / "report.html").read_text(), tmp_path, num_images=11)


def test_ablation(tmp_path):
    write_ablation(Page("Ablation", "", read_results(finished_runs(tmp_path))), tmp_path)
    check((tmp_path / "ablation.html").read_text(), tmp_path, num_images=2)


def test_figure_with_long_words_and_a_wide_table(tmp_path):
    picture = encode(np.full((192, 192, 3), 90, dtype=np.uint8))
    pictures = [Picture(f"Student view {n}: 32 of 64 patches", picture) for n in range(5)]
    table = Table(["a column"] * 30, [["1,234,567"] * 30])
    words = [Text("<script>error()</script>"), Heading("猫 " * 99)]
    page = to_html("W" * 300, [*words, Gallery(pictures, 160), table])
    wide, narrow = check(page, tmp_path, num_images=5)
    # Five in a row on the wide page, two on the narrow one.
    assert wide["images"][0][1] > 200 and 160 < narrow["images"][0][1] < 200


@pytest.mark.parametrize(
    "flaw",
    [
        '<img src="missing.png">',
        '<script>console.error("oh")</script>',
        "<script>undefined_name()</script>",
        '<p style="width: 1500px">wide</p>',
        '<p style="font-size: 7px">small</p>',
    ],
)
def test_the_check_sees_a_flaw(tmp_path, flaw):
    with pytest.raises(AssertionError):
        check(to_html("Title", []).replace("</main>", f"{flaw}</main>"), tmp_path, num_images=0)
