"""An ablation's folder has one owner, and its table is not lost with a file."""

import argparse
import subprocess
import sys

import pytest
from ablation_runs import finished_runs

from aclip.ablation import ablate
from aclip.errors import ConfigError, NotWritten
from aclip.lock import release

OWNER = """
import sys, time
from pathlib import Path
from aclip.lock import claim
claim(Path(sys.argv[1]), "--output", "an ablation")
print("owns", flush=True)
time.sleep(60)
"""


def test_second_ablation_in_a_folder_is_refused_before_it_reads_data(tmp_path):
    arguments = argparse.Namespace(
        rows=["masks"], recipe="demo", ds_config="ds_configs/zero0.json", output=str(tmp_path)
    )
    arguments.overrides, arguments.seeds, arguments.keep_ratio = ["data.train=/none.tar"], 1, [0.5]
    command = [sys.executable, "-c", OWNER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as owner:
        assert owner.stdout.readline() == b"owns\n"
        with pytest.raises(
            ConfigError, match=f"{tmp_path}, which an ablation .process {owner.pid}"
        ):
            ablate._make_runs(arguments)
        owner.kill()
    with pytest.raises(ConfigError, match="data.train is /none.tar"):  # not of a dead one
        ablate._make_runs(arguments)
    release(tmp_path)


def test_table_is_printed_before_the_report_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    runs = finished_runs(tmp_path)
    (tmp_path / "ablation.html").mkdir()  # in the way
    monkeypatch.setattr(ablate, "_make_runs", lambda _: runs)
    arguments = argparse.Namespace(
        seeds=2, processes=None, keep_ratio=[0.5], output=str(tmp_path), overrides=[]
    )
    arguments.script, arguments.recipe, arguments.ds_config = "none.py", "demo", "none.json"
    with pytest.raises(NotWritten, match="ablation.html can't be written"):
        ablate.ablate(arguments)
    assert "| random, 2 x 50 % | 12.0 ± 2.0 |" in capsys.readouterr().out
