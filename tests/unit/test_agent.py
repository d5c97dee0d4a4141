"""The agent leaves no process behind, whatever ends: its own, the supervisor, or itself."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from processes import is_running, still_running

LIMIT = 60.0
# A launcher with a rank below it; both write their number, and the rank what it hears.
LAUNCHER = """
import subprocess, sys, os
print("launcher", os.getpid(), flush=True)
rank = subprocess.Popen([sys.executable, "-c", sys.argv[1]])
sys.exit(rank.wait())
"""
RANK = """
import os, signal, sys, time
signal.signal(signal.SIGUSR1, lambda *_: print("saved", flush=True))
def leave(*_):
    print("leaving", flush=True)
    sys.exit(143)
signal.signal(signal.SIGTERM, leave)
print("rank", os.getpid(), flush=True)
END
time.sleep(60)
"""


@pytest.fixture
def start_agent():
    agents = []

    def start(end="", lost_after=30.0, launchers=1):
        command = [sys.executable, "-c", LAUNCHER, RANK.replace("END", end)]
        agent = subprocess.Popen(
            [sys.executable, "-m", "aclip.nodes.agent"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        agents.append(agent)
        spec = {
            "folder": os.getcwd(),
            "environment": {},
            "commands": [{"arguments": command}] * launchers,
            "lost_after": lost_after,
        }
        agent.stdin.write(json.dumps(spec).encode() + b"\n")
        agent.stdin.flush()
        lines = [agent.stdout.readline().split() for _ in range(2 * launchers)]
        return agent, {name.decode(): int(number) for name, number in lines}

    yield start
    for agent in agents:
        agent.kill()
        agent.wait()


def test_end_of_the_supervisor_ends_everything(start_agent):
    agent, pids = start_agent()
    agent.stdin.close()
    assert agent.wait(LIMIT) == 1
    assert not still_running(pids.values(), LIMIT)
    assert b"supervisor is gone" in agent.stdout.read()


def test_silence_of_the_supervisor_ends_everything(start_agent):
    agent, pids = start_agent(lost_after=3.0)
    for _ in range(16):  # heard of for longer than the limit
        time.sleep(0.25)
        agent.stdin.write(b"\n")
        agent.stdin.flush()
    assert all(map(is_running, pids.values()))
    assert agent.wait(LIMIT) == 1
    assert not still_running(pids.values(), LIMIT)


def test_kill_of_the_agent_ends_the_launcher(start_agent):
    agent, pids = start_agent()
    agent.kill()
    assert not still_running([pids["launcher"]], LIMIT)  # its ranks end by their own watchdogs
    os.kill(pids["rank"], signal.SIGKILL)


def test_kill_of_a_launcher_ends_its_ranks(start_agent):
    agent, pids = start_agent()
    os.kill(pids["launcher"], signal.SIGKILL)
    assert agent.wait(LIMIT) == 128 + signal.SIGKILL
    assert not still_running(pids.values(), LIMIT)


@pytest.mark.parametrize("end, status", [("sys.exit(0)", 0), ("sys.exit(3)", 3)])
def test_status_of_the_launcher_is_the_agents(start_agent, end, status):
    agent, _ = start_agent(end)
    assert agent.wait(LIMIT) == status


def test_signals_reach_the_ranks_and_not_the_launcher(start_agent):
    agent, pids = start_agent()
    agent.stdin.write(b"C")
    agent.stdin.flush()
    assert agent.stdout.readline() == b"saved\n"
    assert all(map(is_running, pids.values()))
    agent.stdin.write(b"\nT\n")
    agent.stdin.flush()
    assert agent.stdout.readline() == b"leaving\n"
    assert agent.wait(LIMIT) == 143
    assert not still_running(pids.values(), LIMIT)


def test_sigterm_to_the_agent_reaches_the_ranks(start_agent):
    agent, _ = start_agent()
    agent.terminate()
    assert agent.stdout.readline() == b"leaving\n"
    assert agent.wait(LIMIT) == 143
