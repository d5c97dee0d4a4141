"""A folder has one owner, as long as that process lives and no longer."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys

import pytest

from aclip import lock
from aclip.errors import ConfigError
from aclip.lock import claim, release

OWNER = """
import os, sys, time
from pathlib import Path
from aclip.lock import claim
claim(Path(sys.argv[1]), "--output", "a run")
child = os.fork() if sys.argv[2] == "fork" else 1
os.write(1, b"%d\\n" % os.getpid())
time.sleep(60)
"""


@pytest.fixture
def owner(tmp_path):
    started = []

    def start(fork="no"):
        process = subprocess.Popen(
            [sys.executable, "-c", OWNER, str(tmp_path), fork], stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        pids = [int(process.stdout.readline()) for _ in range(2 if fork == "fork" else 1)]
        started.extend(pid for pid in pids if pid != process.pid)
        return process

    yield start
    for each in started:
        os.kill(each, signal.SIGKILL) if isinstance(each, int) else each.kill()


def test_second_process_is_told_who_owns_the_folder(tmp_path, owner):
    process = owner()
    with pytest.raises(ConfigError) as raised:
        claim(tmp_path, "--output", "a run")
    words = str(raised.value)
    assert words.startswith(f"--output is {tmp_path}, which a run (process {process.pid} on ")
    assert words.endswith("is using; wait for its end, or give another folder")


def test_killed_owner_leaves_nothing_behind_though_its_child_lives_on(tmp_path, owner):
    process = owner(fork="fork")
    process.kill()
    process.wait()
    assert claim(tmp_path, "--output", "a run") is None
    release(tmp_path)


def test_patience_waits_for_the_owners_end(tmp_path, owner):
    process = owner()
    process.send_signal(signal.SIGKILL)
    assert claim(tmp_path, "--output", "a run", patience=30) is None
    release(tmp_path)


def test_released_folder_is_free_for_another_process(tmp_path, owner):
    claim(tmp_path, "--output", "an export")
    claim(tmp_path, "--output", "an export")  # its own folder is not refused to a process
    release(tmp_path)
    release(tmp_path)
    owner()
    with pytest.raises(ConfigError, match="a run"):
        claim(tmp_path, "--output", "an export")


def test_file_system_without_locks_is_said_and_hinders_nothing(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    assert "knows no locks" in claim(tmp_path, "--output", "a run")


def test_process_that_was_killed_is_waited_for_and_one_that_runs_is_not(tmp_path, owner):
    process = owner()
    facts = json.loads((tmp_path / ".owner").read_text())
    assert not lock._is_ending(facts)
    process.send_signal(signal.SIGSTOP)
    process.kill()  # ends only now and then, since nobody has asked for its status yet
    assert lock._is_ending(facts) and not lock._is_ending({**facts, "host": "elsewhere"})
    assert claim(tmp_path, "--output", "a run") is None
    release(tmp_path)
    process.wait()
    assert lock._is_ending(facts)
