"""The parts of `make gpu-check`, with programs that stand in for them: no GPU is needed."""

import sys
import time
from types import SimpleNamespace

import pytest
import torch

from aclip.benchmarks import gpu_check
from aclip.benchmarks.gpu_check import Part, make_parts, make_report, run_part
from aclip.config.arguments import parse, read_recipe
from aclip.config.ds_config import read_ds_config
from aclip.errors import ConfigError
from aclip.training.run_schedule import RunSchedule

DEMO_SAMPLES = 7680
RANK = """
import pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
def stop(*_):
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "latest").write_text("x")
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
(folder / "metrics.jsonl").touch()
time.sleep(60)
"""
LAUNCHER = """
import subprocess, sys
rank = [sys.executable, "-c", *sys.argv[1:], "--local_rank=0"]
sys.exit(subprocess.run(rank).returncode)
"""


def program(code: str, *words: str) -> list[str]:
    return [sys.executable, "-c", code, *words]


@pytest.mark.parametrize(
    ("code", "ended"),
    [
        ("print('a'); print('b')", "ok"),
        ("print('a'); print('b'); raise SystemExit(3)", "FAILED: status 3"),
    ],
)
def test_part_ends_as_its_program_does_and_its_last_lines_are_kept(tmp_path, code, ended):
    outcome = run_part(Part("x", program(code), 60), tmp_path / "log")
    assert (outcome.ended, outcome.last_lines) == (ended, ["a", "b"])


def test_part_that_runs_into_its_limit_is_ended_with_what_it_has_started(tmp_path):
    inner = f"import time, pathlib; time.sleep(4); pathlib.Path({str(tmp_path / 'late')!r}).touch()"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    outcome = run_part(Part("x", program(code), 1), tmp_path / "log")
    assert outcome.ended == "FAILED: it did not end in 1 s" and outcome.seconds < 4
    time.sleep(max(0.0, 5 - outcome.seconds))
    assert not (tmp_path / "late").exists()


def test_ranks_are_stopped_once_they_train_and_must_leave_a_checkpoint(tmp_path):
    stop = tmp_path / "metrics.jsonl"
    command = program(LAUNCHER, RANK, str(tmp_path))
    outcome = run_part(Part("x", command, 60, stop_once=stop), tmp_path / "log")
    assert outcome.ended == "ok: stopped, with a checkpoint" and outcome.seconds < 50
    stop.unlink()
    (tmp_path / "checkpoints" / "latest").unlink()
    outcome = run_part(Part("x", program("pass"), 60, stop_once=stop), tmp_path / "log")
    assert outcome.ended == "FAILED: status 0, checkpoint none"


def test_report_is_there_after_each_part_and_one_failure_is_the_status(tmp_path, monkeypatch):
    parts = [
        Part("first", program("raise SystemExit(1)"), 60),
        Part("second", program("import sys; print(open(sys.argv[1]).read())", ""), 60),
        Part("third", program("print(3)"), 60, missing="no compiler"),
    ]
    parts[1].command[-1] = str(tmp_path / "out" / "gpu-check.md")
    monkeypatch.setattr(gpu_check, "make_parts", lambda *_: parts)
    monkeypatch.setattr(gpu_check, "check_gpus", lambda: None)
    monkeypatch.setattr(gpu_check, "_memory_gib", lambda: 80)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    arguments = SimpleNamespace(out=str(tmp_path / "out"), compiled=False)
    assert gpu_check.gpu_check(arguments) == 1
    report = (tmp_path / "out" / "gpu-check.md").read_text()
    assert "first   FAILED: status 1" in report and "third   left out: no compiler" in report
    assert "FAILED: status 1" in report.split("## second")[1], "the second part read it"
    parts[0] = Part("first", program("pass"), 60)
    assert gpu_check.gpu_check(arguments) == 0


def test_machine_without_a_gpu_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_check, "check_gpus", lambda: None)
    with pytest.raises(ConfigError, match="no GPU is seen here"):
        gpu_check.gpu_check(SimpleNamespace(out=str(tmp_path / "out"), compiled=False))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("num_gpus", "ranks"), [(1, "1"), (3, "2"), (8, "8"), (16, "8")])
def test_every_run_of_the_check_has_arguments_that_parse(tmp_path, num_gpus, ranks):
    parts = make_parts(tmp_path, num_gpus, 80, compiled=False)
    runs = [part.command for part in parts if "launch/pretrain.py" in part.command]
    assert len(runs) == 6 and sum(part.limit for part in parts) <= 30 * 60
    for command in runs:
        assert command[command.index("--num_accelerators") + 1] == ranks
        arguments = parse(command[command.index("launch/pretrain.py") + 1 :])
        recipe = read_recipe(arguments)
        size = recipe.train.global_batch_size
        assert read_ds_config(arguments.ds_config, size, int(ranks)).micro_batch_size
        steps = RunSchedule(recipe, DEMO_SAMPLES).num_steps
        assert steps == (480 if "zero2" in arguments.output else 20)


def test_the_report_is_markdown_with_the_machine_first():
    outcomes = [gpu_check.Outcome("a part", "ok", 61.0, ["last"])]
    assert make_report([("GPUs", "none")], outcomes).splitlines() == [
        "# gpu-check",
        "",
        "    GPUs  none",
        "",
        "    part    how it ended        time",
        "    a part  ok            1 min 01 s",
        "",
        "## a part",
        "",
        "    last",
    ]
