"""The launch scripts: options with two spellings, and the function that each one calls."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

from aclip.config.arguments import parser

LAUNCH = Path(__file__).parents[2] / "launch"
NEEDED = {
    "ablate": [],
    "benchmark": [],
    "convert": ["folder", "pairs"],
    "evaluate": ["runs/demo", "--suite", "scenes"],
    "export": ["runs/demo", "--format", "open_clip"],
    "report": ["runs/demo"],
    "visualize": ["runs/demo"],
}
"""By script: what it can't do without."""


@pytest.fixture
def parse(monkeypatch):
    """parse(script, *arguments): what the script makes of them, by name."""

    def run(name: str, *arguments: str) -> dict:
        spec = importlib.util.spec_from_file_location(f"launch_{name}", LAUNCH / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        return vars(module.parse_arguments())

    return run


@pytest.mark.parametrize("script", NEEDED)
def test_out_and_output_are_one_option(parse, script):
    short, long = (parse(script, *NEEDED[script], name, "x") for name in ("--out", "--output"))
    assert short == long and "x" in short.values()


def test_out_and_output_are_one_option_of_pretraining():
    for name in ("--out", "--output"):
        arguments = parser().parse_intermixed_args(["--ds_config", "ds.json", name, "x"])
        assert arguments.output == "x"


@pytest.mark.parametrize(
    "source, options, expected",
    [
        pytest.param(
            ["folder", "pairs"],
            ["--shard-size", "7", "--min-side", "8", "--short-side", "9"],
            {"shard_size": 7, "min_side": 8, "short_side": 9},
            id="shards",
        ),
        pytest.param(
            ["table", "a.csv"],
            ["--image-column", "a", "--caption-column", "b", "--caption-column", "c"],
            {"image_column": "a", "caption_column": ["b", "c"]},
            id="columns",
        ),
        pytest.param(["table", "a.csv"], ["--no-quotes"], {"no_quotes": True}, id="quotes"),
        pytest.param(
            ["yfcc-list", "a", "--subset", "b"], ["--image-ids", "c"], {"image_ids": "c"}, id="ids"
        ),
    ],
)
def test_converters_take_hyphens_and_underscores(parse, source, options, expected):
    underscores = [f"--{o[2:].replace('-', '_')}" if o.startswith("--") else o for o in options]
    for spelling in (options, underscores):
        values = parse("convert", *source, *spelling, "--out", "x")
        assert {name: values[name] for name in expected} == expected


@pytest.mark.parametrize("script", sorted(path.stem for path in LAUNCH.glob("*.py")))
def test_a_script_calls_the_function_of_its_own_name(script):
    text = (LAUNCH / f"{script}.py").read_text()
    assert re.search(rf"from aclip\.[\w.]+\.{script} import {script}\b", text)


@pytest.mark.parametrize(
    ("given", "ours"),
    [
        ("--train-data=/d/{0..3}.tar", "for --train-data of open_clip write --train"),
        ("--train_data", "for --train-data of open_clip write --train"),
        ("--batch-size", "write train.global_batch_size="),
        ("--train-data-upsampling-factors", "write data.sources="),
    ],
)
def test_options_of_open_clip_are_refused_with_those_that_stand_for_them(capsys, given, ours):
    with pytest.raises(SystemExit) as caught:
        parser().parse_intermixed_args(["--ds_config", "x.json", given])
    assert caught.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"unrecognized arguments: {given};" in error and ours in error
    assert error.count("of open_clip") == 1
