"""The launch scripts: options with two spellings, and the function that each one calls."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from aclip.config.arguments import ELSEWHERE, parser, read_recipe
from aclip.config.arguments import parse as parse_pretraining
from aclip.config.recipe_file import load_recipe
from aclip.errors import ConfigError

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


@pytest.mark.parametrize(
    "words, here",
    [
        (["--ds-config", "x"], "--ds_config FILE"),
        (["--deepspeed_config=x"], "--ds_config FILE"),
        (["--ds_config", "x", "--train-data", "a.tar"], "--train SHARDS"),
        (["--ds_config", "x", "--epochs=5"], "train.epochs=N"),
        (["--ds_config", "x", "--lr", "1e-3"], "optimizer.lr=X"),
        (["--ds_config", "x", "--batch-size", "32"], "train.global_batch_size=N"),
    ],
)
def test_an_option_of_another_trainer_is_answered_with_what_it_is_called_here(words, here):
    name = next(word for word in words if word not in ("--ds_config", "x")).split("=")[0]
    with pytest.raises(ConfigError) as refusal:
        parse_pretraining(words)
    assert str(refusal.value).startswith(
        f"{name} is not an option of pretrain.py; here it is {here}"
    )


def test_what_other_trainers_options_are_called_here_exists():
    known = {option for action in parser()._actions for option in action.option_strings}
    recipe = load_recipe("demo")
    for answer in ELSEWHERE.values():
        for word in re.findall(r"--\w+", answer):
            assert word in known
        for key in re.findall(r"\b(\w+(?:\.\w+)+)=", answer):
            value = recipe
            for part in key.split("."):
                value = getattr(value, part)
    assert not known & ELSEWHERE.keys()


@pytest.mark.parametrize(
    "words, hostfile, others",
    [
        ([], None, []),
        (["hosts"], "hosts", []),
        (["hosts", "--train", "a.tar"], "hosts", ["--train", "a.tar"]),
        (["--train", "a.tar", "--output", "x"], None, ["--train", "a.tar", "--output", "x"]),
        (["train.epochs=2"], None, ["train.epochs=2"]),
    ],
)
def test_doctor_tells_the_hostfile_from_pretrainings_arguments(parse, words, hostfile, others):
    values = parse("doctor", "--slots", "2", *words)
    assert (values["slots"], values["hostfile"], values["arguments"]) == (2, hostfile, others)


@pytest.mark.parametrize("script", sorted(path.stem for path in LAUNCH.glob("*.py")))
def test_a_script_calls_the_function_of_its_own_name(script):
    text = (LAUNCH / f"{script}.py").read_text()
    assert re.search(rf"from aclip\.[\w.]+\.{script} import {script}\b", text)


@pytest.mark.parametrize(
    "words, train, val",
    [
        ([], "demo", []),
        (["--train", "a.tar"], "a.tar", []),
        (["data.train=a.tar"], "a.tar", []),
        (["--train", "a.tar", "data.val=b.tar"], "a.tar", "b.tar"),
        (["--train", "a.tar", "--val", "b.tar"], "a.tar", "b.tar"),
        (["data.train=demo"], "demo", []),
        (["data.sources=[{shards: a.tar, weight: 1}]"], [], []),
    ],
)
def test_own_data_take_the_place_of_the_built_in_scenes(words, train, val):
    data = read_recipe(parse_pretraining(["--ds_config", "ds.json", *words])).data
    assert (data.train, data.val) == (train, val)


def test_what_checks_the_input_imports_neither_towers_nor_deepspeed():
    """Their packages take seconds, so wrong input would be refused later than it could be."""
    modules = (
        "ablation.ablate",
        "benchmarks.benchmark",
        "evaluation.evaluate",
        "nodes.doctor",
        "planning.plan_input",
        "planning.roofline",
        "reports.visualize",
        "training.start",
        "weights.export",
        "weights.push",
    )
    code = f"import sys, {', '.join(f'aclip.{name}' for name in modules)}\n"
    code += "print(*{'timm', 'transformers', 'torchvision', 'deepspeed'} & sys.modules.keys())"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize(
    "answer, said",
    [
        ("exit 1", "aclip needs Python 3.11 or newer, but ./python is Python 3.10.4"),
        ('case "$2" in *venv*) exit 1;; esac', "./python has no module venv: install python3-venv"),
    ],
)
def test_make_says_what_python_it_needs(tmp_path, answer, said):
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\nif [ "$1" = --version ]; then echo Python 3.10.4; fi\n{answer}\n'
    )
    python.chmod(0o755)
    (tmp_path / "Makefile").write_text((LAUNCH.parent / "Makefile").read_text())
    command = ["make", ".venv/bin/python", "PYTHON=./python"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0 and said in done.stderr
