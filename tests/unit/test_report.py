"""report.html and report.md say what metrics.jsonl and recipe.yaml say."""

import argparse
import html
import io
import re

import pytest
import yaml
from PIL import Image
from report_run import LINES, evaluation, log_step, write_run

from aclip.errors import ConfigError
from aclip.reports.report import report, write_report


def tables_of(page):
    """Rows of cells of each table of an HTML page."""
    return [
        [
            [html.unescape(cell) for cell in re.findall(r"<t[hd]>(.*?)</t[hd]>", row)]
            for row in table.split("</tr>")[:-1]
        ]
        for table in re.findall(r"<table>(.*?)</table>", page, re.DOTALL)
    ]


def tables_of_markdown(text):
    blocks = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    rows = [[line[2:-2].split(" | ") for line in block] for block in blocks]
    return [[header, *body] for header, _, *body in rows]


def number(cell):
    return float(cell.removesuffix(" %").replace(",", "")) / (100 if cell.endswith("%") else 1)


def test_every_value_equals_the_metrics_file(tmp_path):
    run = write_run(tmp_path / "run")
    write_report([run], run)
    for tables in (
        tables_of((run / "report.html").read_text()),
        tables_of_markdown((run / "report.md").read_text()),
    ):
        evaluations, latest = tables
        values = dict(latest[1:])
        last = LINES[3]
        expected = {
            "samples": 3000,
            "step": 3,
            "Loss": last["terms"]["loss"],
            "Loss term contrastive": 0.5,
            "Memory of rank 0, GiB": 3.75,
            "Learning rate": 1e-4,
            "EMA momentum": last["momentum"],
            "skipped/no_image": 21,
            "Images per second": 1234.56,
            "Data wait, %": 3.2,
            "student zero_shot_top1": 0.5,
            "student image_to_text_r1": 0.25,
            "teacher zero_shot_top1": 0.61239,
            "teacher image_to_text_r1": 0.61239 / 2,
            "student num_images": 960,
            "teacher num_images": 960,
        }
        assert values.pop("Loss term byol") == "not finite"
        assert {name: number(cell) for name, cell in values.items()} == pytest.approx(
            expected, rel=5e-4
        )
        assert evaluations[1:] == [
            ["0", "student", "4.32 %", "2.16 %"],
            ["3,000", "student", "50.00 %", "25.00 %"],
            ["3,000", "teacher", "61.24 %", "30.62 %"],
        ]


def test_curves_are_the_values_over_samples(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "aclip.reports.report.draw_chart", lambda lines, marks: drawn.append(lines) or b""
    )
    run = write_run(tmp_path / "run")
    write_report([run], run)
    points = {
        (i, line.label): list(zip(line.samples, line.values, strict=True))
        for i, lines in enumerate(drawn)
        for line in lines
    }
    assert list(points.values()) == [
        [(1000, 2.34567), (2000, 2.34567 / 2), (3000, 2.34567 / 3)],
        [(1000, 1.5), (2000, 0.75), (3000, 0.5)],
        [(0, pytest.approx(4.321)), (3000, 50)],
        [(3000, pytest.approx(61.239))],
        [(0, pytest.approx(2.1605)), (3000, 25)],
        [(3000, pytest.approx(30.6195))],
        [(1000, 1234.56), (2000, 1234.56), (3000, 1234.56)],
        [(1000, 3.2), (2000, 3.2), (3000, 3.2)],
        [(1000, 1.25), (2000, 2.5), (3000, 3.75)],
        [(1000, 3e-4), (2000, 1.5e-4), (3000, pytest.approx(1e-4))],
        [(1000, 0.996), (2000, 0.998), (3000, pytest.approx(1 - 0.004 / 3))],
    ]


def test_measures_of_the_mask_and_warnings_are_shown(tmp_path):
    metrics = {"attention_kept": 0.625, "agreement": 0.5, "loss_kept": 2.34567, "loss_dropped": 1.5}
    blind = {"samples": 1000, "evaluation": "mask", "metrics": metrics, "warning": "it is blind"}
    run = write_run(tmp_path / "run", lines=[blind, log_step(1)])
    write_report([run], run)
    text = (run / "report.md").read_text()
    row = "| 1,000 | mask | 62.50 % | 50.00 % | 2.3457 | 1.5000 |"
    assert row in text and "mask loss_kept | 2.3457" in text
    assert "Warning at 1,000 samples: it is blind." in text
    for chart in ("attention_kept", "agreement", "loss_kept", "loss_dropped"):
        assert f"{chart}.png)" in text


def test_the_page_holds_its_images_and_the_recipe_and_markdown_finds_them(tmp_path):
    run = write_run(tmp_path / "run", ["description='<b>bold</b> & more'"])
    write_report([run], run)
    page, text = (run / "report.html").read_text(), (run / "report.md").read_text()
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    assert page.count("data:image/webp") == 2 and "at 3,000 samples" in page
    assert page.count("data:image/png") == 9
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    assert yaml.safe_load(html.unescape(re.search(r"<pre>(.*?)</pre>", page, re.S)[1])) == recipe
    assert yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.S)[1]) == recipe
    files = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert len(files) == 11
    for file in files:
        with Image.open(run / file) as image:
            image.verify()


def test_the_page_shows_the_latest_recipe(tmp_path):
    run = write_run(tmp_path / "run")
    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe-samples-000000002000.yaml").write_text(
        recipe.replace("keep_ratio: 0.5", "keep_ratio: 0.25")
    )
    write_report([run], run)
    shown = re.search(r"```yaml\n(.*?)```", (run / "report.md").read_text(), re.S)[1]
    assert yaml.safe_load(shown)["mask"]["keep_ratio"] == 0.25


def test_runs_are_compared_side_by_side(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    slower = [evaluation(1000, "student", 0.25), log_step(1)]
    runs = [
        write_run(tmp_path / "first"),
        write_run(tmp_path / "second", ["optimizer.lr=2e-3", "mask.keep_ratio=0.25"], slower),
    ]
    report(argparse.Namespace(runs=[str(run) for run in runs], out=None))
    evaluations, latest, recipes = tables_of((tmp_path / "comparison/report.html").read_text())
    assert latest[0] == ["", "first", "second"]
    assert ["samples", "3,000", "1,000"] in latest
    assert ["teacher zero_shot_top1", "61.24 %", ""] in latest
    assert ["second", "1,000", "student", "25.00 %", "12.50 %"] in evaluations
    assert recipes[1:] == [["mask.keep_ratio", "0.5", "0.25"], ["optimizer.lr", "0.001", "0.002"]]
    text = (tmp_path / "comparison/report.md").read_text()
    assert "](../first/pictures/kept-patches-000000003000.png)" in text


def test_a_long_run_shows_six_pictures_from_the_first_to_the_last(tmp_path):
    lines = [evaluation(1000 * n, "student", 0.1) for n in range(41)]
    run = write_run(tmp_path / "run", lines=lines)
    buffer = io.BytesIO()
    Image.new("RGB", (20, 20)).save(buffer, "PNG")
    for line in lines:
        path = run / "pictures" / f"kept-patches-{line['samples']:012d}.png"
        path.write_bytes(buffer.getvalue())
    write_report([run], run)
    shown = re.findall(r"!\[at (.*?) samples\]", (run / "report.md").read_text())
    assert shown == ["0", "8,000", "16,000", "24,000", "32,000", "40,000"]


def test_a_run_before_its_first_line_has_a_report(tmp_path):
    run = write_run(tmp_path / "run", lines=[])
    write_report([run], run)
    assert "Recipe" in (run / "report.html").read_text()


@pytest.mark.parametrize("missing", ["metrics.jsonl", "recipe.yaml"])
def test_a_folder_that_is_no_run_ends_with_one_sentence(tmp_path, missing):
    run = write_run(tmp_path / "run")
    (run / missing).unlink()
    with pytest.raises(ConfigError, match=f"RUN is .*run, which holds no {missing}"):
        report(argparse.Namespace(runs=[str(run)], out=None))
