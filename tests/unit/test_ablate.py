"""An ablation's table is not lost with a file, and is made again from what is kept."""

import argparse

import pytest
from ablation_runs import DATA, finished_runs

from aclip.ablation import ablate
from aclip.ablation.prepare import Prepared
from aclip.ablation.report import write_report
from aclip.ablation.results import Page
from aclip.errors import ConfigError, NotWritten


def test_table_is_printed_before_the_report_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    runs = finished_runs(tmp_path)
    (tmp_path / "ablation.html").mkdir()  # in the way
    cases = list({run.case.name: run.case for run in runs}.values())
    prepared = Prepared(cases, None, 2, tmp_path, {}, DATA)
    monkeypatch.setattr(ablate, "prepare", lambda _: prepared)
    arguments = argparse.Namespace(
        processes=None, output=str(tmp_path), report_only=None, keep_checkpoints=False
    )
    arguments.script, arguments.recipe, arguments.ds_config = "none.py", "demo", "none.json"
    with pytest.raises(NotWritten, match="ablation.html can't be written"):
        ablate.ablate(arguments)
    assert "| random, 2 x 50 % | 12.0 ± 2.0 |" in capsys.readouterr().out


def test_the_page_is_made_again_from_its_results_alone(tmp_path, capsys):
    runs = finished_runs(tmp_path / "runs")
    runs[-1].note(finished=False)
    cases = list({run.case.name: run.case for run in runs}.values())
    prepared = Prepared(cases, None, 2, tmp_path / "runs", {}, DATA, note="All are equal.")
    page = Page("Ablation", prepared.note, ablate.results_so_far(prepared))
    write_report(page, tmp_path / "first")
    arguments = argparse.Namespace(output=str(tmp_path / "again"))
    arguments.report_only = str(tmp_path / "first" / "ablation.json")
    assert ablate.ablate(arguments) == 0
    first, again = (sorted((tmp_path / name).iterdir()) for name in ("first", "again"))
    assert [path.name for path in first] == [path.name for path in again]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]
    text = capsys.readouterr().out
    assert "3 of 4 runs are finished." in text and "All are equal." in text
    assert "| 1.50 | 2.00 | 41.3 | 1 of 2 |" in text
    for content in ("[", "[]", '{"title": "a", "note": "", "rows": [{}]}'):
        (tmp_path / "wrong.json").write_text(content)
        arguments.report_only = str(tmp_path / "wrong.json")
        with pytest.raises(ConfigError, match="wrong.json, which can't be read .it is not what"):
            ablate.ablate(arguments)
