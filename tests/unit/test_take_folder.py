"""What a start finds in its run folder: another owner, its own run, or another one."""

import json
import subprocess
import sys

import pytest
from run_starts import at, save, start

from aclip.errors import ConfigError, NotWritten
from aclip.lock import PATIENCE_VARIABLE, release
from aclip.run_folder import checkpoint_folder
from aclip.training.take_folder import own_folder


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def other(tmp_path):
    """Another run's folder, at 8 samples."""
    save(tmp_path / "other", 8)
    return tmp_path / "other"


@pytest.mark.parametrize("form", ["auto", "none", "a checkpoint", "a run folder", "a link"])
def test_same_command_continues_with_every_form_of_resume(run, other, form, tmp_path):
    (tmp_path / "link").symlink_to(other)
    resume = {
        "a checkpoint": str(other / "checkpoints" / at(8)),
        "a run folder": str(other),
        "a link": str(tmp_path / "link"),
    }.get(form, form)
    first = None if form in ("auto", "none") else at(8)
    assert start(run, resume) == first
    # Without a checkpoint of its own it begins again.
    assert start(run, resume, saves=[12]) == first
    if first is not None:
        save(other, 20)  # the other run goes on, and removes what this one began from
        checkpoint_folder.prune(other / "checkpoints", other / "checkpoints" / at(20), keep=1)
    assert start(run, resume, saves=[16]) == at(12)
    assert start(run, resume) == at(16)
    assert start(run, "auto") == at(16)  # as the supervisor and README's command say
    assert start(run, resume) == at(16)


def test_folder_says_which_checkpoint_of_another_run_it_began_from(run, other):
    start(run, str(other))
    said = json.loads((run / "start.json").read_text())
    checkpoint = str(other / "checkpoints" / at(8))
    assert said == {"resume": str(other), "checkpoint": checkpoint}


def test_two_runs_are_not_mixed_in_one_folder(run, other, tmp_path):
    start(run, saves=[12])
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    save(tmp_path / "third", 4)
    for resume, words in (
        ("none", f"which holds a run already \\(its latest checkpoint is {at(12)}\\)"),
        (str(other), "which holds a run that did not begin there"),
        (str(tmp_path / "third" / "checkpoints" / at(4)), "which holds a run that did not"),
    ):
        with pytest.raises(ConfigError, match=f"--resume is {resume}, but --output ") as e:
            start(run, resume)
        assert e.match(words) and e.match("give another --output")
    after = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert before.keys() == after.keys()
    assert {path.name for path in before if before[path] != after[path]} <= {".owner"}
    # The word that began it is not another run's word.
    start(tmp_path / "new", str(other), saves=[12])
    with pytest.raises(ConfigError, match="holds a run that did not begin there"):
        start(tmp_path / "new", str(run))


def test_run_goes_back_to_its_own_checkpoint_once(run):
    start(run, saves=[4, 8, 12])
    back = str(run / "checkpoints" / at(4))
    assert start(run, back) == at(4)
    # Killed before it has saved: neither form goes on with what was given up.
    assert start(run, back) == at(4)
    assert start(run, "auto", saves=[8]) == at(4)
    assert start(run, back) == at(8)
    assert start(run, str(run)) == at(8)
    assert start(run, str(run / "checkpoints")) == at(8)


def test_copy_of_a_checkpoint_can_be_resumed_from(run):
    start(run, saves=[4, 8])
    best = save(run, 4, name=f"{at(4)}-best")
    checkpoint_folder.make_latest(run / "checkpoints", run / "checkpoints" / at(8))
    assert start(run) == at(8)
    assert start(run, str(best)) == best.name
    assert start(run) == best.name


OWNER = """
import sys, time
from pathlib import Path
from aclip.lock import claim
claim(Path(sys.argv[1]), "--output", "a run")
print("owns", flush=True)
time.sleep(float(sys.argv[2]))
"""


@pytest.fixture
def owner(run):
    started = []

    def own(seconds):
        run.mkdir()
        process = subprocess.Popen(
            [sys.executable, "-c", OWNER, str(run), str(seconds)], stdout=subprocess.PIPE
        )
        started.append(process)
        assert process.stdout.readline() == b"owns\n"
        return process

    yield own
    for process in started:
        process.kill()


def test_second_start_by_hand_is_refused_at_once(run, owner):
    process = owner(60)
    with pytest.raises(ConfigError, match=f"--output is {run}, which a run .process {process.pid}"):
        start(run)


def test_patience_that_is_no_number_is_one_sentence(run, monkeypatch):
    monkeypatch.setenv(PATIENCE_VARIABLE, "long")
    with pytest.raises(ConfigError, match="ACLIP_PATIENCE is long; give seconds"):
        start(run)


def test_start_by_who_restarts_runs_waits_for_the_one_before(run, owner, monkeypatch, capsys):
    owner(0.5)
    monkeypatch.setenv(PATIENCE_VARIABLE, "30")
    own_folder(run)
    release(run)
    assert "is using; wait for its end, or give another folder; this start waits for that, at " in (
        capsys.readouterr().out
    )


def test_copy_of_a_run_folder_is_nobodys(run, owner, tmp_path):
    owner(60)
    start(tmp_path / "mine", saves=[8])
    (tmp_path / "mine" / ".owner").write_bytes((run / ".owner").read_bytes())
    assert start(tmp_path / "mine") == at(8)


@pytest.mark.parametrize("name", ["checkpoints", "tensorboard", "pictures"])
def test_part_of_the_folder_that_cannot_be_written_is_one_sentence(run, name):
    run.mkdir()
    (run / name).write_text("in the way")
    with pytest.raises(ConfigError, match=f"{name} of --output is {run / name}, which can't be"):
        start(run)


def test_metrics_that_are_a_folder_are_one_sentence(run):
    (run / "metrics.jsonl").mkdir(parents=True)
    with pytest.raises(ConfigError, match="metrics.jsonl is no file that can be written"):
        start(run)


def test_owners_file_that_cannot_be_written_is_bad_input_and_not_tried_again(run):
    (run / ".owner").mkdir(parents=True)
    with pytest.raises(ConfigError, match=".owner can't be written") as raised:
        start(run)
    assert not isinstance(raised.value, NotWritten)
