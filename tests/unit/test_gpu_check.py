"""`make gpu-check` without a GPU: its parts' commands, its report and its status."""

import json
import re
import sys
from types import SimpleNamespace

import pytest
import torch

from aclip.benchmarks import gpu_check
from aclip.benchmarks.gpu_check import DEMO_STEPS, batch_size, make_parts, make_report
from aclip.benchmarks.parts import CheckFailed, Outcome, Part
from aclip.config.arguments import parse, read_recipe
from aclip.config.ds_config import read_ds_config
from aclip.config.recipe_file import load_recipe
from aclip.errors import ConfigError
from aclip.training.run_schedule import RunSchedule

DEMO_SAMPLES = 51_200


def program(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def arguments(out, minutes=1.0):
    return SimpleNamespace(out=str(out), compiled=False, minutes=minutes)


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Lets the check take this machine for one with a GPU; restores what it does to SIGTERM."""
    monkeypatch.setattr(gpu_check, "check_gpus", lambda: None)
    monkeypatch.setattr(gpu_check, "_memory_gib", lambda: 80)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check.signal, "signal", lambda *_: None)


def test_report_is_there_while_a_part_runs_and_one_failure_is_the_status(
    tmp_path, monkeypatch, capsys, on_a_gpu
):
    report = tmp_path / "gpu-check.md"
    parts = [
        Part("first", program("print('why'); raise SystemExit(1)"), 60),
        Part("second", program(f"print(open({str(report)!r}).read())"), 60, num_lines=99),
        Part("third", program(""), 60, left_out="no compiler"),
    ]
    monkeypatch.setattr(gpu_check, "make_parts", lambda *_: parts)
    assert gpu_check.gpu_check(arguments(tmp_path)) == 1
    text = report.read_text()
    assert re.search(r"first +\d+ s  FAILED: status 1", text) and "left out: no compiler" in text
    read_meanwhile = text.split("## second")[1]
    assert "FAILED: status 1" in read_meanwhile and "running: at most 1 min" in read_meanwhile
    printed = capsys.readouterr().out
    assert "=== first" in printed and "    why\n--- FAILED: status 1" in printed
    assert "1 of 3 parts failed" in printed and printed.startswith("GPUs")
    figures = json.loads((tmp_path / "gpu-check.json").read_text())
    assert [each["ended"] for each in figures["parts"]] == ["FAILED", "ok", "left out"]
    assert torch.__version__ in figures["machine"]["torch"]
    parts[0] = Part("first", program(""), 60)
    assert gpu_check.gpu_check(arguments(tmp_path)) == 0


def test_machine_without_a_gpu_is_refused_with_what_was_found(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu_check, "check_gpus", lambda: None)
    with pytest.raises(ConfigError, match="no GPU is seen here"):
        gpu_check.gpu_check(arguments(tmp_path / "out"))
    assert "none that torch can use" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="--minutes is 0"):
        gpu_check.gpu_check(arguments(tmp_path / "out", minutes=0))


@pytest.mark.parametrize(("num_gpus", "ranks"), [(1, "1"), (3, "2"), (8, "8"), (16, "8")])
def test_every_run_of_the_check_has_arguments_that_parse(tmp_path, num_gpus, ranks, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    parts = make_parts(tmp_path, num_gpus, 80, compiled=False)
    runs = [part for part in parts if "launch/pretrain.py" in part.command]
    names = []
    for part in runs:
        command = part.command
        words = parse(command[command.index("launch/pretrain.py") + 1 :])
        recipe = read_recipe(words)
        names.append(words.output.rsplit("/", 1)[1])
        started = command[command.index("--num_accelerators") + 1]
        assert started == ("1" if names[-1] == "one-gpu" else ranks)
        size = recipe.train.global_batch_size
        assert read_ds_config(words.ds_config, size, int(started)).micro_batch_size
        steps = RunSchedule(recipe, DEMO_SAMPLES).num_steps
        assert steps == (DEMO_STEPS if names[-1] == "demo" else 20)
        assert part.left_out == (
            "the runs above had one GPU" if names[-1] == "one-gpu" and num_gpus == 1 else ""
        )
    assert names == ["demo", "demo", "zero2", "zero3", "zero3_offload", "compiled", "one-gpu"]


def test_the_cost_table_of_the_check_has_arguments_that_parse(tmp_path, monkeypatch):
    [part] = [
        part for part in make_parts(tmp_path, 1, 80, False) if "benchmark.py" in part.command[1]
    ]
    monkeypatch.setattr(sys, "argv", part.command[1:])
    namespace = {"__name__": "launch_benchmark"}
    exec((gpu_check.ROOT / "launch/benchmark.py").read_text(), namespace)
    values = namespace["parse_arguments"]()
    assert (values.against, values.batch_size) == ("open_clip", 512)
    assert values.recipes == [name for name in gpu_check.COMPARED if load_recipe(name)]
    assert values.json == str(tmp_path.absolute() / "cost.json")


def test_offload_is_left_out_without_the_compiler_that_it_needs(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: None)
    left_out = {part.title: part.left_out for part in make_parts(tmp_path, 8, 80, False)}
    assert left_out.pop("zero3_offload, 20 steps").startswith("g++ is missing")
    assert not any(left_out.values())


@pytest.mark.parametrize(
    ("visible", "words"),
    [
        (None, ["--num_accelerators", "2"]),
        ("", ["--num_accelerators", "2"]),
        ("5,3,7", ["--include", "localhost:5,3"]),
    ],
)
def test_runs_take_the_gpus_that_are_visible(tmp_path, monkeypatch, visible, words):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    command = make_parts(tmp_path, 3, 80, compiled=False)[0].command
    assert command[command.index("--quiet") + 1 : command.index("launch/pretrain.py")] == words


def test_compiled_rows_of_the_kernels_are_timed_on_request(tmp_path):
    without, with_them = (make_parts(tmp_path, 1, 80, each)[-1].command for each in (False, True))
    assert without == [*with_them, "-k", "not compiled"]


def test_tests_that_need_a_gpu_are_where_the_check_looks_for_them():
    tests = gpu_check.ROOT / "tests"
    marked = {
        path.relative_to(tests).parts[0]
        for path in tests.rglob("*.py")
        if "mark.gpu" in path.read_text() and path.name != "test_gpu_check.py"
    }
    assert marked == {"kernel"}


@pytest.mark.parametrize(
    ("memory_gib", "images"), [(139, 512), (79, 512), (47, 256), (39, 128), (22, 64), (8, 16)]
)
def test_batch_that_fills_the_card(memory_gib, images):
    assert batch_size(memory_gib) == images


def test_a_run_of_pytest_in_which_nothing_passed_is_a_failure():
    assert gpu_check._count_tests(".\n110 passed in 60 s") == "110 passed in 60 s"
    for output in ("", "no tests ran", "112 skipped in 3 s"):
        with pytest.raises(CheckFailed, match="no test has passed"):
            gpu_check._count_tests(output)


def test_the_report_is_markdown_with_the_machine_first():
    outcomes = [
        Outcome("a part", "ok", "fine", 61.0, ("last",)),
        Outcome("b", "left out", "why"),
    ]
    assert make_report({"GPUs": "none"}, outcomes).splitlines() == [
        "# gpu-check",
        "",
        "    GPUs  none",
        "",
        "    part          time  how it ended",
        "    a part  1 min 01 s  ok: fine",
        "    b              0 s  left out: why",
        "",
        "## a part",
        "",
        "    last",
    ]
