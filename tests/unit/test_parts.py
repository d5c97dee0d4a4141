"""Parts of a check and their limits, with programs that stand in for them."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest

from aclip.benchmarks.demo_check import check_continued, check_losses, check_stopped
from aclip.benchmarks.parts import FAILED, LEFT_OUT, OK, RUNNING, CheckFailed, Part, run_parts
from aclip.benchmarks.parts import run_part as run

# It starts a child in a session of its own, whose number it writes, and both sleep.
SLEEPER = """
import pathlib, subprocess, sys, time
command = [sys.executable, "-c", "import time; time.sleep(60)"]
child = subprocess.Popen(command, start_new_session=True)
pathlib.Path(sys.argv[1]).write_text(str(child.pid))
time.sleep(60)
"""
# A launcher with a rank, and a data worker of the rank, which has its command line too. When it is
# asked to end, the rank says whether its worker was left alone.
RANK = """
import pathlib, signal, subprocess, sys, time
folder = pathlib.Path(sys.argv[1])
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "--local_rank=0"])
def stop(*_):
    time.sleep(0.5)
    print("alone" if worker.poll() is None else "with its worker", flush=True)
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
(folder / "trains").touch()
time.sleep(60)
"""
LAUNCHER = f"""
import subprocess, sys
rank = [sys.executable, "-c", {RANK!r}, sys.argv[1], "--local_rank=0"]
sys.exit(subprocess.run(rank).returncode)
"""


def program(code: str, *words) -> list[str]:
    return [sys.executable, "-c", code, *map(str, words)]


@pytest.mark.parametrize(
    ("code", "ended", "remark"),
    [
        ("", OK, ""),
        ("raise SystemExit(3)", FAILED, "status 3"),
        ("import os; os.kill(os.getpid(), 9)", FAILED, "status -9"),
    ],
)
def test_part_ends_as_its_program_does(tmp_path, code, ended, remark):
    outcome = run(Part("x", program(code), 60), tmp_path / "log")
    assert (outcome.ended, outcome.remark) == (ended, remark)


def test_last_lines_are_shown_of_a_failure_and_where_a_part_says_so(tmp_path):
    code = "print('a'); print('b'); raise SystemExit(int(__import__('sys').argv[1]))"
    for status, num_lines, lines in ((0, 0, ()), (0, 1, ("b",)), (1, 0, ("a", "b"))):
        part = Part("x", program(code, status), 60, num_lines=num_lines)
        assert run(part, tmp_path / "log").last_lines == lines


def test_part_that_sleeps_is_ended_at_its_limit_with_all_that_it_has_started(tmp_path):
    outcome = run(Part("x", program(SLEEPER, tmp_path / "pid"), 1), tmp_path / "log")
    assert outcome.verdict == "FAILED: it did not end in 1 s" and outcome.seconds < 9
    child = int((tmp_path / "pid").read_text())
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


def test_sigterm_goes_to_the_ranks_alone_once_they_train(tmp_path):
    part = Part(
        "x",
        program(LAUNCHER, tmp_path),
        30,
        status=143,
        stop_when=(tmp_path / "trains").exists,
        check=str.strip,
    )
    outcome = run(part, tmp_path / "log")
    assert outcome.verdict == "ok: alone"
    early = Part("x", program(""), 30, status=143, stop_when=lambda: True)
    assert run(early, tmp_path / "log").verdict == "FAILED: status 0, not 143"


def test_what_a_check_says_or_stumbles_over_is_the_remark(tmp_path):
    def says(output):
        return output.strip().upper()

    def refuses(output):
        raise CheckFailed("no checkpoint")

    def stumbles(output):
        return {}["loss"]

    verdicts = [
        run(Part("x", program("print('fine')"), 60, check=check), tmp_path / "log").verdict
        for check in (says, refuses, stumbles)
    ]
    assert verdicts == ["ok: FINE", "FAILED: no checkpoint", "FAILED: KeyError: 'loss'"]


def test_a_failed_part_does_not_stop_the_next_one_and_each_change_is_told(tmp_path):
    told = []
    parts = [
        Part("first", program("raise SystemExit(1)"), 60),
        Part("second", program(""), 60, left_out="no compiler"),
        Part("third", program(""), 60),
    ]
    run_parts(parts, tmp_path, 60, lambda outcomes: told.append([each.ended for each in outcomes]))
    assert told == [
        [RUNNING],
        [FAILED],
        [FAILED, LEFT_OUT],
        [FAILED, LEFT_OUT, RUNNING],
        [FAILED, LEFT_OUT, OK],
    ]


def test_the_time_of_all_parts_limits_each_and_what_has_not_begun_has_failed(tmp_path):
    parts = [Part(name, program("import time; time.sleep(30)"), 60) for name in "ab"]
    outcomes = run_parts(parts, tmp_path, 1, lambda _: None)
    assert outcomes[0].verdict.startswith("FAILED: it did not end in 1 s")
    assert outcomes[1].verdict == "FAILED: no time left of 1 s"


def test_nothing_goes_on_when_the_check_itself_is_ended(tmp_path):
    code = (
        "import signal, sys; from pathlib import Path; from aclip.benchmarks.parts import *\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        "run_part(Part('x', sys.argv[2:], 60), Path(sys.argv[1]))"
    )
    command = program(code, tmp_path / "log", *program(SLEEPER, tmp_path / "pid"))
    check = subprocess.Popen(command)
    deadline = time.monotonic() + 30
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(check.pid, signal.SIGTERM)
    assert check.wait(30) == 143
    child = int((tmp_path / "pid").read_text())
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


def write_metrics(run_folder: Path, losses: list[float], evaluated: bool = True) -> None:
    run_folder.mkdir(exist_ok=True)
    lines = [
        f'{{"samples": {32 * step}, "step": {step}, "terms": {{"loss": {loss}}}}}\n'
        for step, loss in enumerate(losses, 1)
    ]
    if evaluated:
        name = '"evaluation": "student", "metrics": {"zero_shot_top1": 0.125}'
        lines.append(f'{{"samples": {32 * len(losses)}, {name}}}\n')
    (run_folder / "metrics.jsonl").write_text("".join(lines))


@pytest.mark.parametrize(
    ("losses", "evaluated", "said"),
    [
        ([4.04, 2.02], True, "loss 4.040 to 2.020, at most 1.00% from zero2's"),
        ([4.0, 2.06], True, "at most 3.00% from zero2's; 2% is allowed"),
        ([4.0], True, "zero3 ended after step 1 of 2"),
        ([4.0, 2.0], False, "zero3 was not evaluated at its end"),
    ],
)
def test_losses_of_another_stage_are_those_of_zero2(tmp_path, losses, evaluated, said):
    write_metrics(tmp_path / "zero2", [4.0, 2.0])
    write_metrics(tmp_path / "zero3", losses, evaluated)
    check = partial(check_losses, tmp_path / "zero3", 2, tmp_path / "zero2", "")
    if losses == [4.04, 2.02]:
        assert check() == said
    else:
        with pytest.raises(CheckFailed, match=said):
            check()


def test_losses_beside_themselves_are_only_told(tmp_path):
    write_metrics(tmp_path / "zero2", [4.0, 2.0])
    assert check_losses(tmp_path / "zero2", 2, tmp_path / "zero2", "") == "loss 4.000 to 2.000"


def test_a_stopped_run_says_so_and_leaves_a_checkpoint(tmp_path):
    output = "stopped by SIGTERM at 1,920 samples; the same command continues"
    with pytest.raises(CheckFailed, match="no checkpoint"):
        check_stopped(tmp_path, output)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest").touch()
    assert check_stopped(tmp_path, output) == "status 143 at 1,920 samples"
    with pytest.raises(CheckFailed, match="SIGTERM"):
        check_stopped(tmp_path, "killed")


def test_a_continued_run_says_from_where_and_what_it_reached(tmp_path):
    write_metrics(tmp_path, [4.0, 2.0])
    output = f"continuing from {tmp_path}/checkpoints/samples-32 at 32 samples"
    assert check_continued(tmp_path, 2, output) == "from 32 samples; zero_shot_top1 student 12.5%"
    with pytest.raises(CheckFailed, match="continued"):
        check_continued(tmp_path, 2, "")
