"""Checks nodes before a run: what each says of itself, what they see of each other, an all-reduce.

A problem is one sentence that begins with the node's name and ends with what to do.
"""

import argparse
import json
import secrets
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from aclip.cli import EXIT_BAD_INPUT, GIB, MIB, text_table
from aclip.nodes.examined import Examined, compare
from aclip.nodes.hostfile import LOCAL, Host, check_hostfile, environment_for_nodes
from aclip.nodes.node import Node
from aclip.nodes.remote_shell import SSH, check_remote_shell, is_here, open_python

ANSWER_SECONDS = 60.0
ALL_REDUCE_SECONDS = 180.0
SHM_BYTES_OF_SLOT = 512 * MIB
"""Asked for where no recipe says how much a batch takes."""
NETWORK = "set NCCL_SOCKET_IFNAME (GLOO_SOCKET_IFNAME without GPUs) in .deepspeed_env"


def doctor(arguments: argparse.Namespace) -> int:
    """Runs `launch/doctor.py`; returns the exit status."""
    hosts, problems = [Host(LOCAL, arguments.slots)], []
    if arguments.hostfile:
        hosts, problems = check_hostfile(arguments.hostfile)
    ready = examine(hosts, arguments.arguments, arguments, problems)
    return 0 if ready else EXIT_BAD_INPUT


def examine(
    hosts: list[Host], run_arguments: list[str], options: argparse.Namespace, problems=()
) -> bool:
    """Examines the hosts and prints a table and the problems; returns whether a run would start.

    Args:
        run_arguments: pretrain.py's, of which shards and run folder are checked.
        options: rsh, master_addr and master_port.
        problems: those that are known already.
    """
    remote_shell = options.rsh or SSH
    if not all(is_here(remote_shell, host.name) for host in hosts):
        check_remote_shell(remote_shell)
    output, shards, shm_of_slot = _what_to_check(run_arguments, sum(host.slots for host in hosts))
    tokens = [f".doctor-{secrets.token_hex(8)}" for _ in hosts]
    nodes = [Examined(host, token) for host, token in zip(hosts, tokens, strict=True)]
    master = {
        "master_addr": options.master_addr or (hosts[0].address if hosts else LOCAL),
        "master_port": options.master_port,
    }
    question = {
        "folder": str(Path.cwd()),
        "output": str(output),
        "shards": shards,
        "tokens": tokens,
        "environment": environment_for_nodes(),
    }
    barrier = threading.Barrier(max(1, len(nodes)))
    ask = partial(_ask, remote_shell=remote_shell, question=question | master, barrier=barrier)
    with ThreadPoolExecutor(max(1, len(nodes))) as pool:
        list(pool.map(ask, nodes, [index == 0 for index in range(len(nodes))]))
    compare(nodes, output, shm_of_slot)
    problems = [*problems, *(f"{n.host.name}: {text}" for n in nodes for text in n.problems)]
    if nodes:
        print(format_table(nodes), flush=True)
    if not problems:
        print(f"all-reduce over {sum(host.slots for host in hosts)} ranks ...", flush=True)
        report, problems = _all_reduce(hosts, remote_shell, master)
        print(report, flush=True)
    for problem in problems:
        print(f"problem: {problem}", flush=True)
    print("ready" if not problems else "not ready: a run would fail", flush=True)
    return not problems


def _what_to_check(
    run_arguments: list[str], num_ranks: int
) -> tuple[Path, list[tuple[str, str | list[str]]], int]:
    """The run folder, the recipe's entries of training shards (the demo makes its own), and the
    bytes of /dev/shm that the data workers of a slot take."""
    if not run_arguments:
        return Path("runs"), [], SHM_BYTES_OF_SLOT
    # Imported here: recipes import torch, which a mistake in the hostfile should not cost.
    from aclip.config.arguments import DEMO, parse, read_recipe, run_folder
    from aclip.config.geometry import shared_bytes

    arguments = parse(["--ds_config", "none", *run_arguments])
    recipe = read_recipe(arguments)
    data = recipe.data
    entries = [(f"data.sources.{i}.shards", each.shards) for i, each in enumerate(data.sources)]
    if not data.sources and data.train and data.train != DEMO:
        entries = [("data.train", data.train)]
    local_batch_size = recipe.train.global_batch_size // max(1, num_ranks)
    of_slot = 0 if data.workers == 0 else shared_bytes(recipe, local_batch_size)
    return run_folder(arguments), entries, of_slot


def _ask(node: Examined, is_first: bool, remote_shell, question, barrier) -> None:
    """Fills in a node's answer and its clock."""
    process = open_python(
        remote_shell,
        node.host.name,
        "aclip.nodes.probe",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    # Ends a process that hangs, so that the reads below return nothing.
    end = threading.Timer(ANSWER_SECONDS, process.kill)
    end.start()
    try:
        question = question | {"token": node.token, "listens": is_first}
        process.stdin.write(json.dumps(question) + "\n")
        process.stdin.flush()
        node.answer = json.loads(process.stdout.readline())
        node.skew = _skew(process)
    except (OSError, ValueError):
        node.problems.append(_why_silent(process, remote_shell, node.host))
    finally:
        # The node's file stays until every node has looked for it.
        barrier.wait()
        end.cancel()
        try:
            process.communicate(timeout=5)
        except (subprocess.TimeoutExpired, ValueError, OSError):
            process.kill()
    if node.answer is not None:
        node.problems += node.answer["problems"]


def _skew(process: subprocess.Popen) -> float:
    """Seconds that the node's clock is ahead, taken at the middle of a question and its answer."""
    before = time.time()
    process.stdin.write("time\n")
    process.stdin.flush()
    there = float(process.stdout.readline())
    return there - (before + time.time()) / 2


def _why_silent(process: subprocess.Popen, remote_shell: str, host: Host) -> str:
    try:
        _, errors = process.communicate(timeout=5)
    except (subprocess.TimeoutExpired, ValueError, OSError):
        process.kill()
        errors = ""
    if process.returncode == -signal.SIGKILL:
        return (
            f"no answer in {ANSWER_SECONDS:g} s; look at its load, and for a file system that hangs"
        )
    last = errors.strip().splitlines()[-1] if errors.strip() else "no answer"
    if process.returncode == 255:
        return f"not reachable ({last}); check that `{remote_shell} {host.name} true` works"
    return (
        f"{sys.executable} -m aclip.nodes.probe does not run there ({last}); install aclip at the "
        "same path on every node"
    )


def _all_reduce(hosts: list[Host], remote_shell: str, master: dict) -> tuple[str, list[str]]:
    """A line on the bandwidth, and the problem if there was one."""
    lines: dict[str, list[str]] = {host.name: [] for host in hosts}
    world_size = sum(host.slots for host in hosts)
    nodes, first_rank = [], 0
    for host in hosts:
        common = {
            "MASTER_ADDR": "127.0.0.1" if host.name == LOCAL else master["master_addr"],
            "MASTER_PORT": str(master["master_port"]),
            "WORLD_SIZE": str(world_size),
        }
        ranks = [
            common | {"RANK": str(first_rank + local), "LOCAL_RANK": str(local)}
            for local in range(host.slots)
        ]
        command = [sys.executable, "-m", "aclip.nodes.all_reduce"]
        spec = {
            "folder": str(Path.cwd()),
            "environment": environment_for_nodes(),
            "commands": [{"arguments": command, "environment": rank} for rank in ranks],
            "lost_after": ALL_REDUCE_SECONDS,
        }
        keep = lines[host.name]
        nodes.append(
            Node(remote_shell, host, spec, lambda line, keep=keep: keep.append(line.decode()))
        )
        first_rank += host.slots
    deadline = time.monotonic() + ALL_REDUCE_SECONDS
    while time.monotonic() < deadline and any(node.status is None for node in nodes):
        if any(node.status for node in nodes):
            break
        time.sleep(0.1)
    late = all(not node.status for node in nodes)
    for node in nodes:
        node.end(10.0)
    failed = [node for node in nodes if node.status]
    if not failed:
        found = [line for line in lines[hosts[0].name] if line.startswith("all-reduce")]
        return found[-1].strip(), []
    node = failed[0]
    why = f"did not end in {ALL_REDUCE_SECONDS:g} s"
    if not late:
        said = [line.strip() for line in lines[node.host.name] if line.strip()]
        if node.status == EXIT_BAD_INPUT and said:
            return "all-reduce failed", [f"{node.host.name}: {said[-1].partition('error: ')[2]}"]
        why = f"ended with status {node.status} ({said[-1] if said else 'no output'})"
    where = f"{master['master_addr']}:{master['master_port']}"
    return "all-reduce failed", [
        f"{node.host.name}: an all-reduce over all ranks {why}; check that the nodes reach {where} "
        f"and each other, and {NETWORK}"
    ]


def format_table(nodes: list[Examined]) -> str:
    """One row a node."""
    head = ["node", "slots", "python", "aclip", "torch", "deepspeed", "cuda", "GPUs", "disk GiB"]
    rows = [[*head, "shm GiB", "clock s"]]
    for node in nodes:
        row = [node.host.name, str(node.host.slots)]
        if node.answer is None:
            rows.append([*row, "no answer"])
            continue
        answer, versions = node.answer, node.answer["versions"]
        row += [versions[name] for name in head[2:7]]
        kinds = {gpu["name"] for gpu in answer["gpus"]}
        row.append(f"{len(answer['gpus'])} {'/'.join(sorted(kinds))}".strip())
        row += [f"{answer[name] / GIB:,.1f}" for name in ("disk_bytes", "shm_bytes")]
        rows.append([*row, f"{node.skew:+.2f}"])
    return text_table(rows, left=range(len(rows[0])))
