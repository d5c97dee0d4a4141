"""Runs launch scripts in forks of one process that has imported what they import.

A rank takes seconds of CPU to import torch, DeepSpeed and timm, most of a short run; here that is
done once for all of them. Each line of stdin asks for one run, as JSON: the script and its
arguments, and for each rank an output file and an environment. Each answer is a line to the file
descriptor that the command line names (imports print to stdout): the ranks' exit statuses, or null
if they took longer than the limit and were killed.
"""

import gc
import json
import os
import runpy
import signal
import sys
import time

# What launch/pretrain.py imports when it starts and, late, when its input is good.
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401

import aclip.reports.report
import aclip.training.checked_run
import aclip.training.pretrain  # noqa: F401


def main() -> None:
    answers = os.fdopen(int(sys.argv[1]), "w")
    for line in sys.stdin:
        request = json.loads(line)
        pids = []
        for rank in request["ranks"]:
            pid = os.fork()
            if pid == 0:
                _become_rank(rank, request["arguments"])
                return
            pids.append(pid)
        answers.write(json.dumps(_wait(pids, request["timeout"])) + "\n")
        answers.flush()


def _become_rank(rank: dict, arguments: list[str]) -> None:
    gc.freeze()
    os.setsid()  # so that its data workers can be killed with it
    output = os.open(rank["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.clear()
    os.environ.update(rank["env"])
    sys.argv = arguments
    runpy.run_path(arguments[0], run_name="__main__")


def _wait(pids: list[int], timeout: float) -> list[int] | None:
    deadline = time.monotonic() + timeout
    statuses = {}
    while len(statuses) < len(pids):
        for pid in set(pids) - set(statuses):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                statuses[pid] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            for pid in set(pids) - set(statuses):
                os.killpg(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            return None
        time.sleep(0.02)
    return [statuses[pid] for pid in pids]


if __name__ == "__main__":
    main()
