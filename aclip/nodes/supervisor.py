"""Runs `launch/pretrain.py` on every node of a hostfile and starts it again when it fails.

On each node an agent (agent.py) starts the DeepSpeed launcher; this process only watches, keeps a
log for each node and decides. A start continues from the last checkpoint.
"""

import argparse
import os
import signal
import sys
import time
from datetime import datetime
from pathlib import Path

from aclip.cli import (
    EXIT_BAD_INPUT,
    EXIT_NON_FINITE,
    EXIT_STOPPED_BY_SIGNAL,
    DefaultsShown,
    path,
    run_reporting_errors,
)
from aclip.config.arguments import parse, run_folder
from aclip.errors import ConfigError, NotWritten
from aclip.files import append, make_folder
from aclip.lock import PATIENCE
from aclip.nodes import agent, doctor, start_ranks
from aclip.nodes.hostfile import Host, environment_for_nodes, read_hostfile
from aclip.nodes.node import CONNECTION_LOST, Node
from aclip.nodes.remote_shell import SSH, ssh_options
from aclip.run_folder import checkpoint_folder
from aclip.run_folder.layout import CHECKPOINTS_FOLDER, LOGS_FOLDER

LOOK = 0.5
SECONDS_TO_END = 15.0
"""When a node has failed, the others have this time to notice and end before they are killed."""
LONGEST_BACKOFF = 300.0
FINAL = {EXIT_BAD_INPUT: "bad input", EXIT_NON_FINITE: "a loss that is not finite"}
"""Statuses after which the same command would fail again."""
LAST_PORT = 65535


class Supervisor:
    """Starts, watches, ends and starts again.

    Args:
        options: the command line's.
        hosts: those that the hostfile names.
        output: the run folder.
    """

    def __init__(self, options: argparse.Namespace, hosts: list[Host], output: Path):
        self.options, self.hosts, self.output = options, hosts, output
        self.remote_shell = options.rsh or SSH + ssh_options(options.lost_after)
        self.environment = environment_for_nodes() | PATIENCE
        self.logs = output / LOGS_FOLDER
        self.first_checkpoint = self._newest()
        self._signals: list[int] = []
        self._passed_on = 0

    def supervise(self) -> int:
        """Returns the run's exit status."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, lambda received, _: self._signals.append(received))
        failures, start = 0, 1
        while True:
            before = self._newest()
            statuses = self._run_once(start)
            failed = {host.name: status for host, status in statuses.items() if status}
            if not failed:
                return 0
            for status in FINAL:
                if status in failed.values():
                    self._say(f"the run ended with {FINAL[status]}; it is not started again")
                    return status
            if self._stopping or EXIT_STOPPED_BY_SIGNAL in failed.values():
                self._say("stopped; the same command continues from the last checkpoint")
                return EXIT_STOPPED_BY_SIGNAL
            failures = failures + 1 if self._newest() == before else 1
            ends = ", ".join(f"{name} with status {status}" for name, status in failed.items())
            if failures > self.options.max_restarts:
                self._say(
                    f"start {start} failed ({ends}), the {failures}th time without a new "
                    f"checkpoint; --max_restarts is {self.options.max_restarts}; see {self.logs}"
                )
                return next(iter(failed.values()))
            pause = min(LONGEST_BACKOFF, self.options.backoff * 2 ** (failures - 1))
            self._say(f"start {start} failed ({ends}); the next one is in {pause:g} s")
            if self._pause(pause):
                return EXIT_STOPPED_BY_SIGNAL
            start += 1

    @property
    def _stopping(self) -> bool:
        return any(number != signal.SIGUSR1 for number in self._signals)

    def _run_once(self, start: int) -> dict[Host, int]:
        """Starts every node and returns their statuses once all processes on them have ended."""
        make_folder(self.logs)
        nodes = [self._start_node(index, host, start) for index, host in enumerate(self.hosts)]
        try:
            self._watch(nodes)
        finally:
            # An agent that can't be reached ends its processes after `lost_after` by itself.
            deadline = time.monotonic() + self.options.lost_after
            for node in nodes:
                node.end(max(0.0, deadline - time.monotonic()))
            if any(node.status == CONNECTION_LOST for node in nodes):
                time.sleep(max(0.0, deadline - time.monotonic()))
        return {node.host: node.status for node in nodes}

    def _watch(self, nodes: list[Node]) -> None:
        failed_at = None
        while any(node.status is None for node in nodes):
            time.sleep(LOOK)
            message = agent.ALIVE
            for number in self._signals[self._passed_on :]:
                message += agent.CHECKPOINT if number == signal.SIGUSR1 else agent.TERMINATE
            self._passed_on = len(self._signals)
            for node in nodes:
                node.tell(message)
            if failed_at is None and any(node.status for node in nodes):
                failed_at = time.monotonic()
            if failed_at is not None and time.monotonic() - failed_at > SECONDS_TO_END:
                return

    def _start_node(self, index: int, host: Host, start: int) -> Node:
        log = self.logs / f"node-{index}-{host.name}.log"
        append(log, f"=== start {start}, {datetime.now().isoformat(' ', 'seconds')}\n".encode())
        slots = {each.address: each.slots for each in self.hosts}
        words = [
            f"--master_addr={self.options.master_addr or self.hosts[0].address}",
            f"--master_port={self.options.master_port}",
            self.options.script,
            *self._run_arguments(),
        ]
        spec = {
            "folder": os.getcwd(),
            "environment": self.environment,
            "commands": [{"arguments": start_ranks.command(slots, index, words)}],
            "lost_after": self.options.lost_after,
        }
        return Node(self.remote_shell, host, spec, _Log(log, echo=index == 0))

    def _run_arguments(self) -> list[str]:
        """pretrain.py's arguments; once this run has saved a checkpoint, they resume from it."""
        if self._newest() == self.first_checkpoint:
            return self.options.arguments
        return [*self.options.arguments, "--resume", "auto"]

    def _newest(self) -> Path | None:
        return checkpoint_folder.find(self.output / CHECKPOINTS_FOLDER, "auto")

    def _pause(self, seconds: float) -> bool:
        """Waits; returns whether a signal asked to stop."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self._stopping:
            time.sleep(LOOK)
        return self._stopping

    def _say(self, text: str) -> None:
        print(f"[supervisor] {text}", flush=True)


class _Log:
    """Appends lines to a file, and shows them here until nobody looks any more.

    A full disk costs lines of the file. If it stopped the reading, the node would stop at its next
    line.
    """

    def __init__(self, path: Path, echo: bool):
        self._path, self._echo = path, echo
        self._is_full = False

    def __call__(self, line: bytes) -> None:
        try:
            append(self._path, line)
            self._is_full = False
        except NotWritten as error:
            if not self._is_full:
                print(f"[supervisor] {error}; the run goes on, and the log lacks lines", flush=True)
            self._is_full = True
        if self._echo:
            try:
                sys.stdout.buffer.write(line)
                sys.stdout.buffer.flush()
            except OSError:
                self._echo = False


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="launch/multinode.sh",
        description="Pre-train on the nodes of a hostfile; starts again after a failure.",
        formatter_class=DefaultsShown,
    )
    parser.add_argument("--script", required=True, help=argparse.SUPPRESS)
    parser.add_argument(
        "--max_restarts", type=int, default=3, help="in a row without a new checkpoint"
    )
    parser.add_argument(
        "--backoff", type=float, default=10.0, help="seconds before a restart; doubles in a row"
    )
    parser.add_argument(
        "--lost_after",
        type=float,
        default=30.0,
        help="seconds of silence after which a node counts as lost, and ends what runs on it",
    )
    parser.add_argument("--master_addr", help="of the first node (default: its name)")
    parser.add_argument("--master_port", type=int, default=29500)
    parser.add_argument(
        "--rsh", help=f"remote shell, such as 'srun --overlap -N1 -n1 -w {{host}}' (default: {SSH})"
    )
    parser.add_argument("hostfile", type=path)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of pretrain.py")
    return parser.parse_args()


def check_options(options: argparse.Namespace) -> None:
    """Raises ConfigError for a number out of its range."""
    limits = {"max_restarts": 0, "backoff": 0, "lost_after": 1, "master_port": 1}
    for name, least in limits.items():
        if getattr(options, name) < least:
            raise ConfigError(f"--{name} is {getattr(options, name)}; give {least} or more")
    if options.master_port > LAST_PORT:
        raise ConfigError(f"--master_port is {options.master_port}; give at most {LAST_PORT}")


def main() -> int:
    options = parse_arguments()
    check_options(options)
    hosts = read_hostfile(options.hostfile)
    output = run_folder(parse(options.arguments))
    # Written out, so that `~` means this user's folder on every node.
    options.arguments += ["--output", str(output)]
    if not doctor.examine(hosts, options.arguments, options):
        return EXIT_BAD_INPUT
    return Supervisor(options, hosts, output).supervise()


if __name__ == "__main__":
    run_reporting_errors(main)
