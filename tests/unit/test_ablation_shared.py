"""Several ablations in one folder: each run is trained once, a lost one's are taken over, and one
that is there goes on with its own settings only."""

import json
import subprocess
import sys
import time
from collections import Counter

import pytest
from ablation_runs import DATA, cases_of

from aclip.ablation.runner import Runner
from aclip.ablation.runs import CLAIM_FILE, make_run, make_runs
from aclip.errors import ConfigError
from aclip.lock import InUse, claim, release

NAMES = ("clip", "random_1x", "random_2x")
CHILD = """
import pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[sys.argv.index("--output") + 1])
def note(word):
    with open(folder.parent / "lines", "a") as file:
        file.write(f"{folder.name} {word}\\n")
def end(*_):
    note("stopped")
    sys.exit(143)
signal.signal(signal.SIGTERM, end)
note("started")
while (folder.parent / "hold").exists():
    time.sleep(0.05)
note("done")
"""
SHARED = """
import sys
from pathlib import Path
from aclip.ablation import runner
sys.path.insert(0, sys.argv[2])
from ablation_runs import DATA, cases_of
from aclip.ablation.runs import make_runs
runner.LOOK_ELSEWHERE = 0.1
out = Path(sys.argv[1])
command = [sys.executable, str(out / "child.py")]
runs = make_runs(cases_of(*sys.argv[3:]), 2, out, {}, DATA)
sys.exit(bool(any(runner.Runner(command, [{}], lambda: None).run(runs))))
"""


@pytest.fixture
def start(tmp_path, request):
    started = []
    (tmp_path / "child.py").write_text(CHILD)

    def start():
        command = [sys.executable, "-c", SHARED, str(tmp_path), str(request.path.parent), *NAMES]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def lines_of(tmp_path):
    path = tmp_path / "lines"
    return [line.split() for line in path.read_text().splitlines()] if path.is_file() else []


def test_each_run_is_trained_once_and_a_lost_one_is_taken_over(tmp_path, start):
    (tmp_path / "hold").touch()
    lost, other = start(), start()
    deadline = time.monotonic() + 300
    while len(lines_of(tmp_path)) < 2:  # each has started a run, which is held
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert len({name for name, _ in lines_of(tmp_path)}) == 2
    lost.kill()
    lost_lines = lost.communicate()[0]
    (tmp_path / "hold").unlink()
    lines = other.communicate(timeout=300)[0]
    assert other.returncode == 0
    runs = make_runs(cases_of(*NAMES), 2, tmp_path, {}, DATA)
    names = sorted(run.folder.name for run in runs)
    counts = Counter(word for _, word in lines_of(tmp_path))
    assert sorted(name for name, word in lines_of(tmp_path) if word == "done") == names
    # The run of the lost one was told to end, and began again.
    assert counts == {"started": 7, "stopped": 1, "done": 6}
    assert all(run.is_finished for run in runs)
    # One of both came second and said who trains the first run.
    assert "is trained by an ablation (process " in lines + lost_lines


def test_the_report_waits_for_runs_elsewhere(tmp_path, monkeypatch, capsys):
    (run,) = make_runs(cases_of("clip"), 1, tmp_path, {}, DATA)
    monkeypatch.setattr("aclip.ablation.runner.LOOK_ELSEWHERE", 0.05)
    looks = []

    def claimed(*_, **__):
        looks.append(1)
        if len(looks) == 3:  # it ends elsewhere
            run.note(finished=True)
        raise InUse("in use", "an ablation (process 1 on a, since b)")

    monkeypatch.setattr("aclip.ablation.runner.claim", claimed)
    assert Runner(["none"], [{}], lambda: None).run([run]) == ([], False)
    assert len(looks) == 3
    shown = capsys.readouterr().out
    assert shown.count("clip-seed0 is trained by an ablation (process 1 on a, since b)") == 1


def test_a_run_of_other_settings_that_came_meanwhile_is_refused(tmp_path):
    (run,) = make_runs(cases_of("clip"), 1, tmp_path, {}, DATA)
    (other,) = make_runs(cases_of("clip"), 1, tmp_path, {"gradient_clipping": 1.0}, DATA)
    other.note(finished=False)
    with pytest.raises(ConfigError, match="clip-seed0, which was trained with other settings"):
        Runner(["none"], [{}], lambda: None).run([run])
    release(run.folder, CLAIM_FILE)


def test_locks_of_several_kinds_are_apart(tmp_path):
    claim(tmp_path, "--output", "a run")
    claim(tmp_path, "--output", "an ablation", name=CLAIM_FILE)
    assert sorted(path.name for path in tmp_path.iterdir()) == [CLAIM_FILE, ".owner"]
    release(tmp_path, CLAIM_FILE)
    claim(tmp_path, "--output", "an ablation", name=CLAIM_FILE)
    for name in (CLAIM_FILE, ".owner"):
        release(tmp_path, name)


def test_a_run_goes_on_where_its_data_lie_elsewhere(tmp_path):
    (run,) = make_runs(cases_of("clip"), 1, tmp_path, {}, DATA)
    run.note(finished=False)
    moved = ["data.train=/elsewhere/*.tar", "data.val=/elsewhere/val.tar", "train.log_every=1"]
    (moved,) = make_runs(cases_of("clip", overrides=moved), 1, tmp_path, {}, DATA)
    moved.check()
    state = json.loads((run.folder / "ablation.json").read_text())
    del state["settings"]["recipe"]["train"]["evaluate_at"]  # a key that came later
    (run.folder / "ablation.json").write_text(json.dumps(state))
    run.check()


def test_a_run_on_shards_of_other_content_is_refused_where_that_is_known(tmp_path):
    def data(*marks):
        kinds = [{"sha256": "a", "marks": mark} for mark in marks]
        return DATA | {"content": dict(zip(("train", "val"), kinds, strict=True))}

    def run_with(data):
        return make_runs(cases_of("clip"), 1, tmp_path, {}, data)[0]

    run_with(data("b", "c")).note(finished=True)
    for alike in (data("b", "c"), data("b", None), data(None, "c")):
        run_with(alike).check()
    with pytest.raises(ConfigError, match="now: data.val, whose shards hold other samples"):
        run_with(data("b", "d")).check()
    run_with(DATA).note(finished=True)  # of an earlier version
    run_with(data("b", "d")).check()


def test_a_folder_with_other_settings_is_refused(tmp_path):
    (run,) = make_runs(cases_of("clip"), 1, tmp_path, {}, DATA)
    run.check()
    run.note(finished=True)
    run.check()
    (tmp_path / "clip-seed0" / "ablation.json").write_text('{"settings"')
    with pytest.raises(ConfigError, match="ablation.json is damaged; remove"):
        run.check()
    run.note(finished=True)
    for other in (
        make_runs(cases_of("clip", overrides=["optimizer.lr=2e-3"]), 1, tmp_path, {}, DATA),
        make_runs(cases_of("clip"), 1, tmp_path, {"gradient_clipping": 1.0}, DATA),
        make_runs(cases_of("clip"), 1, tmp_path, {}, DATA | {"samples": 1}),
    ):
        with pytest.raises(ConfigError, match="clip-seed0, which was trained with other settings"):
            other[0].check()
    with pytest.raises(ConfigError, match="optimizer.lr 0.001 -> 0.002"):
        make_runs(cases_of("clip", overrides=["optimizer.lr=2e-3"]), 1, tmp_path, {}, DATA)[
            0
        ].check()
    killed = make_runs(cases_of("clip"), 1, tmp_path / "killed", {}, DATA)[0]
    killed.folder.mkdir(parents=True)
    (killed.folder / "ablation.json.123.tmp").touch()
    killed.check()  # a start that was killed while it noted its settings
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    with pytest.raises(ConfigError, match="it holds no run"):
        make_run(run.case, 0, tmp_path / "other", {}, DATA).check()
