"""Wrong input of the scripts is refused before anything is imported that takes seconds."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"
MAIN = """
import runpy, sys
from aclip import cli
from aclip.errors import ConfigError

def run(main):
    try:
        main()
    except ConfigError as error:
        print(error)
    print(sorted({"torch", "timm", "transformers", "deepspeed"} & sys.modules.keys()))

cli.run_reporting_errors = run
script, *sys.argv[1:] = sys.argv[1:]
runpy.run_path(script, run_name="__main__")
"""
LIGHT, WITH_RECIPE = "[]", "['torch']"
"""Recipes import torch, which takes a second or two; towers and DeepSpeed take several more."""
EXPORT = ["export.py", "--format", "open_clip", "--out", "{tmp}/out"]


@pytest.fixture
def run_script(tmp_path):
    """run_script(script, *arguments): the sentence, and the packages that were imported for it."""

    def run(script: str, *arguments: str) -> tuple[str, str]:
        words = [argument.format(tmp=tmp_path) for argument in arguments]
        finished = subprocess.run(
            [sys.executable, "-c", MAIN, str(LAUNCH / script), *words],
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        assert finished.returncode == 0, finished.stderr
        *_, sentence, imported = finished.stdout.splitlines()
        return sentence, imported

    return run


@pytest.mark.parametrize(
    "arguments, sentence, imported",
    [
        ([*EXPORT, "{tmp}/none"], "none is neither a checkpoint.*no such folder", LIGHT),
        ([*EXPORT, "{tmp}/file"], "file is neither a checkpoint.*it is a file", LIGHT),
        ([*EXPORT, "{tmp}/empty"], "empty is neither a checkpoint.*it is empty", LIGHT),
        ([*EXPORT, "{tmp}/run"], "run is neither.*a run that has no checkpoint yet", LIGHT),
        ([*EXPORT[:-1], "{tmp}/file/x", "{tmp}/run"], "file/x, which can.t be written", LIGHT),
        (["report.py", "{tmp}/none"], "none, which does not exist", LIGHT),
        (["report.py", "{tmp}/file"], "file, which is a file", LIGHT),
        (["report.py", "{tmp}/empty"], "empty, which holds no metrics.jsonl", LIGHT),
        (["visualize.py", "{tmp}/run"], "run is neither.*a run that has no checkpoint yet", LIGHT),
        (["benchmark.py", "--scaling", "{tmp}/none"], "none, which can.t be read", LIGHT),
        (["benchmark.py", "{tmp}/none.yaml"], "none.yaml, but there is no such file", WITH_RECIPE),
        (["ablate.py", "--recipe", "none"], "none, which is not a recipe", WITH_RECIPE),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_input_is_refused_at_once(run_script, tmp_path, arguments, sentence, imported):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").touch()
    script, *words = arguments
    found = run_script(script, *words)
    assert found[1] == imported
    assert re.search(sentence, found[0]), found[0]


@pytest.mark.parametrize(
    "code",
    [
        "from aclip.weights.find_named import check_init, find_named",
        "from aclip.weights.push import push",
        "from aclip.nodes import doctor, start_ranks",
        "from aclip.reports.visualize import visualize",
    ],
)
def test_what_looks_first_imports_no_torch(code):
    check = f"import sys; {code}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0
