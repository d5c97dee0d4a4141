"""When a run is started again, with what, and when not."""

import argparse
import multiprocessing

import pytest
from run_starts import at, save, start

from aclip.cli import EXIT_UNREADABLE_DATA, run_reporting_errors
from aclip.config.arguments import parse
from aclip.errors import ConfigError, DataError
from aclip.nodes.hostfile import Host
from aclip.nodes.supervisor import Supervisor, _Log, check_options

HOSTS = [Host("a", 1), Host("b", 1)]


class Scripted(Supervisor):
    """Runs end as they are told to: (status of a, status of b, samples of a new checkpoint)."""

    def __init__(self, folder, ends, arguments=(), max_restarts=2):
        options = argparse.Namespace(
            rsh=None,
            lost_after=1.0,
            max_restarts=max_restarts,
            backoff=1.0,
            arguments=list(arguments),
        )
        super().__init__(options, HOSTS, folder / "run")
        self.ends = list(ends)
        self.pauses, self.started_with = [], []

    def _run_once(self, start):
        self.started_with.append(self._run_arguments())
        *statuses, samples = self.ends.pop(0)
        if samples:
            folder = self.output / "checkpoints" / f"samples-{samples:012d}"
            folder.mkdir(parents=True)
            (folder / "manifest.json").write_text("{}")
            (folder.parent / "latest").write_text(folder.name)
        return dict(zip(self.hosts, statuses, strict=True))

    def _pause(self, seconds):
        self.pauses.append(seconds)
        return False


def test_failures_in_a_row_have_a_limit_and_the_pauses_double(tmp_path, capsys):
    run = Scripted(tmp_path, [(137, 1, 0)] * 3)
    assert run.supervise() == 137
    assert run.pauses == [1.0, 2.0]
    assert "--max_restarts is 2" in capsys.readouterr().out


def test_new_checkpoint_counts_as_progress(tmp_path):
    ends = [(1, 1, 16), (1, 1, 0), (1, 1, 32), (1, 1, 48), (0, 0, 64)]
    run = Scripted(tmp_path, ends, max_restarts=2)
    assert run.supervise() == 0
    assert run.pauses == [1.0, 2.0, 1.0, 1.0]


def test_data_that_could_not_be_read_are_tried_again(tmp_path):
    def read():
        raise DataError("shard s3://a.tar can't be read: timeout; check the address")

    process = multiprocessing.get_context("fork").Process(target=run_reporting_errors, args=[read])
    process.start()
    process.join()
    assert process.exitcode == EXIT_UNREADABLE_DATA
    run = Scripted(tmp_path, [(1, process.exitcode, 0), (0, 0, 0)])
    assert run.supervise() == 0


@pytest.mark.parametrize("status", [2, 3])
def test_what_would_fail_again_is_not_started_again(tmp_path, status):
    run = Scripted(tmp_path, [(1, status, 0)])
    assert run.supervise() == status
    assert run.pauses == []


def test_node_that_is_told_to_stop_stops_the_run(tmp_path):
    run = Scripted(tmp_path, [(143, 143, 16)])
    assert run.supervise() == 143
    assert run.pauses == []


def test_restart_resumes_the_runs_own_checkpoint_whatever_it_began_from(tmp_path):
    arguments = ["--ds_config", "x.json", "--resume", "none"]
    run = Scripted(tmp_path, [(1, 1, 0), (1, 1, 16), (0, 0, 32)], arguments)
    assert run.supervise() == 0
    assert run.started_with == [arguments, arguments, [*arguments, "--resume", "auto"]]


@pytest.mark.parametrize("resume", ["none", "auto", "PATH"])
def test_restart_of_the_same_words_goes_on_before_and_after_a_checkpoint(tmp_path, resume):
    """Also where its first checkpoint bears the name of the one that it began from."""
    save(tmp_path / "other", 8)
    words = ["--ds_config", "x.json", "--resume", resume.replace("PATH", str(tmp_path / "other"))]
    run = Scripted(tmp_path, [(1, 1, 0), (1, 1, 0), (0, 0, 0)], words)
    found = []

    def start_and_save(number):
        told = parse(run._run_arguments())
        found.append(start(run.output, told.resume, saves=[8, 16][number - 2 : number - 1]))
        return dict(zip(run.hosts, run.ends.pop(0)[:2], strict=True))

    run._run_once = start_and_save
    assert run.supervise() == 0
    first = at(8) if resume == "PATH" else None
    assert found == [first, first, at(8)]


def test_start_waits_for_the_processes_of_the_one_before(tmp_path):
    patience = float(Scripted(tmp_path, []).environment["ACLIP_PATIENCE"])
    assert patience > 90  # what a network file system takes to give a lost node's lock up


def test_full_disk_costs_lines_of_a_log_and_does_not_stop_its_node(tmp_path, capfd):
    (tmp_path / "file").write_text("in the way")
    log = _Log(tmp_path / "file" / "node.log", echo=True)
    for line in (b"one\n", b"two\n"):
        log(line)
    said = capfd.readouterr().out
    assert said.count("node.log can't be written") == 1 and "the log lacks lines" in said
    assert "one\n" in said and "two\n" in said


@pytest.mark.parametrize(
    "name, value",
    [("max_restarts", -1), ("backoff", -1), ("lost_after", 0), ("master_port", 70000)],
)
def test_option_out_of_range_is_one_sentence(name, value):
    options = {"max_restarts": 1, "backoff": 1, "lost_after": 5, "master_port": 1, "rsh": None}
    with pytest.raises(ConfigError, match=f"--{name} is {value}"):
        check_options(argparse.Namespace(**options | {name: value}))
