"""A run over two hosts equals one on a single host, through every kind of failure."""

import json
import random
import re
import subprocess
import time
from pathlib import Path

import pytest
from processes import arguments_of, children, ranks, signal_all, still_running
from two_hosts import TwoHosts, why_not

WHY_NOT = why_not()
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(WHY_NOT is not None, reason=f"no two hosts: {WHY_NOT}"),
]
ROOT = Path(__file__).parents[2]
KINDS = ("rank", "launcher", "link", "master")
STEPS_BETWEEN = 12
LONGEST = 300.0
"""Seconds within which everything of a broken start must be gone; far more than it takes."""


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hosts")
    (folder / ".deepspeed_env").write_text(
        "GLOO_SOCKET_IFNAME=eth0\nOMP_NUM_THREADS=1\nDS_ACCELERATOR=cpu\n"
    )
    made = TwoHosts(folder)
    try:
        made.open()
        yield made
    finally:
        made.close()


def arguments(small_run, output, steps) -> list[str]:
    words = ["--ds_config", str(ROOT / "ds_configs/zero0.json"), "--output", str(output)]
    words += [*small_run, f"train.epochs={steps / 6}", "train.checkpoint_every=32"]
    return [*words, "train.hang_timeout=120"]


def losses(run: Path) -> dict[int, float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [record["step"] for record in records]
    assert steps == sorted(set(steps)), "each step once"
    return {record["step"]: record["terms"]["loss"] for record in records}


class Supervised:
    """A run through multinode.sh from the first host; its processes, and how to break them."""

    def __init__(self, hosts: TwoHosts, output: Path, words: list[str]):
        self.hosts, self.output = hosts, output
        self.log = output.with_suffix(".log")
        self.num_broken = 0
        options = ["--rsh", hosts.remote_shell, "--lost_after", "15", "--backoff", "0.5"]
        with open(self.log, "wb") as log:
            self.process = hosts.start(
                str(ROOT / "launch/multinode.sh"),
                *options,
                str(hosts.hostfile),
                *words,
                cwd=hosts.folder,
                stdout=log,
            )

    def agents(self) -> list[int]:
        """By host: what ssh has started there."""
        pids = [pid for pid in self.hosts.processes() if is_agent(pid)]
        return sorted(pids, key=lambda pid: node_rank(pid))

    def started(self) -> list[int]:
        """Everything of the present start on both hosts."""
        return [pid for pid in self.hosts.processes() if is_part_of_a_start(pid)]

    def wait_for_step(self, step: int) -> None:
        """Until a start after the last broken one has made this step or a later one."""
        while self.last_step() < step:
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.02)

    def last_step(self) -> int:
        starts = self.starts()
        if len(starts) <= self.num_broken:
            return 0
        steps = re.findall(r"^step (\d+)/", starts[-1], re.MULTILINE)
        return int(steps[-1]) if steps else 0

    def starts(self) -> list[str]:
        """What the first host's ranks have said, start by start."""
        log = self.output / "logs" / f"node-0-{self.hosts.addresses[0]}.log"
        return log.read_text().split("=== start ")[1:] if log.exists() else []

    def inject(self, kind: str) -> None:
        """Breaks the present start and waits until nothing of it is left."""
        started = self.started()
        self.num_broken = len(self.starts())
        first, second = self.agents()
        if kind == "link":
            self.hosts.set_link(up=False)
        elif kind == "launcher":
            signal_all(children(second))
        else:
            (rank,) = ranks(first if kind == "master" else second)
            signal_all([rank])
        left = still_running(started, LONGEST)
        assert not left, [arguments_of(pid) for pid in left]
        if kind == "link":
            self.hosts.set_link(up=True)


def is_agent(pid: int) -> bool:
    words = arguments_of(pid)
    return "aclip.nodes.agent" in words and not any("ssh" in word for word in words)


def is_part_of_a_start(pid: int) -> bool:
    words = arguments_of(pid)
    names = ("aclip.nodes.agent", "deepspeed.launcher.launch")
    return any(name in words for name in names) or "--local_rank=0" in words


def node_rank(agent: int) -> str:
    (launcher,) = children(agent)
    return next(word for word in arguments_of(launcher) if word.startswith("--node_rank="))


def survive(hosts, output, words, kinds, steps) -> Supervised:
    """A run to its end through faults at random steps, in this order."""
    rng = random.Random(len(kinds))
    run = Supervised(hosts, output, words)
    try:
        for index, kind in enumerate(kinds):
            first = 1 + index * (steps // (len(kinds) + 1))
            run.wait_for_step(first + rng.randrange(STEPS_BETWEEN // 2))
            run.inject(kind)
        assert run.process.wait(LONGEST) == 0, run.log.read_text()
    finally:
        run.process.kill()
        signal_all(run.started())
    return run


@pytest.fixture(scope="module")
def single_host(launcher, small_run, tmp_path_factory):
    """single_host(steps) -> the losses of an uninterrupted run of two ranks on one host."""
    found = {}

    def run(steps: int) -> dict[int, float]:
        if steps not in found:
            output = tmp_path_factory.mktemp("single") / "run"
            result = launcher.run(*arguments(small_run, output, steps), launcher=False, timeout=600)
            assert result.status == 0, result.output
            found[steps] = losses(output)
        return found[steps]

    return run


def test_run_over_two_hosts_survives_every_fault_and_equals_a_single_host(
    hosts, small_run, single_host, tmp_path
):
    kinds = list(KINDS)
    random.Random(1).shuffle(kinds)
    steps = STEPS_BETWEEN * (len(kinds) + 1)
    output = tmp_path / "run"
    run = survive(hosts, output, arguments(small_run, output, steps), kinds, steps)
    assert losses(output) == pytest.approx(single_host(steps), rel=1e-6)
    assert sorted(losses(output)) == list(range(1, steps + 1))
    assert hosts.processes() == []
    assert hosts.ports() == []
    said = run.log.read_text()
    assert said.count("the next one is in") >= len(kinds)
    for index, address in enumerate(hosts.addresses):
        log = (output / "logs" / f"node-{index}-{address}.log").read_text()
        assert log.count("=== start") >= len(kinds) + 1


@pytest.mark.soak
def test_start_without_ssh_on_each_node_equals_a_single_host(
    hosts, small_run, single_host, tmp_path
):
    """As a scheduler starts it that runs a command on every node itself."""
    steps = STEPS_BETWEEN * (len(KINDS) + 1)
    output = tmp_path / "run"
    words = ["deepspeed", "--hostfile", str(hosts.hostfile), "--no_ssh"]
    words += ["--master_addr", hosts.addresses[0], "--master_port", "29611"]
    script = [str(ROOT / "launch/pretrain.py"), *arguments(small_run, output, steps)]
    environment = {"GLOO_SOCKET_IFNAME": "eth0", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    nodes = [
        hosts.start(
            *words,
            "--node_rank",
            str(index),
            *script,
            host=index,
            env=environment,
            cwd=hosts.folder,
        )
        for index in range(2)
    ]
    try:
        outputs = [node.communicate(timeout=LONGEST)[0] for node in nodes]
    finally:
        signal_all([pid for pid in hosts.processes()])
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert losses(output) == pytest.approx(single_host(steps), rel=1e-6)


@pytest.mark.soak
def test_soak_of_twenty_kills(hosts, small_run, single_host, tmp_path):
    kinds = [*KINDS] * 5
    random.Random(2).shuffle(kinds)
    steps = STEPS_BETWEEN * (len(kinds) + 1)
    output = tmp_path / "run"
    survive(hosts, output, arguments(small_run, output, steps), kinds, steps)
    assert losses(output) == pytest.approx(single_host(steps), rel=1e-6)
    assert sorted(losses(output)) == list(range(1, steps + 1))
    assert hosts.processes() == []
    assert hosts.ports() == []


def test_two_hosts_are_two(hosts):
    """What listens on one host can't be reached at the other's address."""
    server = (
        "import socket; s = socket.create_server(('', 29700)); print('up', flush=True); s.accept()"
    )
    listening = hosts.start("python", "-c", server)
    assert listening.stdout.readline() == "up\n"
    try:
        for address, answer in zip(hosts.addresses, ("yes", "no"), strict=True):
            client = (
                "import socket\n"
                f"try: socket.create_connection(('{address}', 29700), 2)\n"
                "except OSError: print('no')\nelse: print('yes')"
            )
            asked = hosts.start("python", "-c", client, host=1, stderr=subprocess.DEVNULL)
            assert asked.communicate(timeout=60)[0].strip() == answer
            if answer == "yes":
                listening.wait(10)
    finally:
        listening.kill()
        listening.wait()


@pytest.mark.soak
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_memory_on_one_and_two_ranks_is_what_the_planner_says(hosts, tmp_path, stage):
    zero = {"stage": stage, "reduce_bucket_size": 100_000}
    if stage == 3:
        zero |= {"stage3_param_persistence_threshold": 100, "memory_efficient_linear": False}
    path = tmp_path / "ds_config.json"
    path.write_text(json.dumps({"zero_optimization": zero, "gradient_clipping": 0.0}))
    script = str(ROOT / "launch/benchmark.py")
    words = ["python", script, "demo", "--scaling", str(hosts.hostfile)]
    words += ["--rsh", hosts.remote_shell, "--ds_config", str(path), "--steps", "12"]
    words += ["--out", str(tmp_path / "out"), "--batch_size", "4"]
    words += ["--set", "loss.simclr=1", "loss.byol=2"]
    measured = hosts.start(*words, cwd=hosts.folder)
    output, _ = measured.communicate(timeout=LONGEST)
    assert measured.returncode == 0, output
    rows = json.loads((tmp_path / "out/scaling.json").read_text())["rows"]
    assert [(row["mode"], row["ranks"]) for row in rows] == [
        ("weak", 1),
        ("weak", 2),
        ("strong", 1),
        ("strong", 2),
    ]
    for row in rows:
        assert row["planned_mib"] == pytest.approx(row["memory_mib"], rel=0.05), output
        assert row["images_per_second"] > 0
        assert 0 <= row["communication"] <= 1
        assert row["communication"] > 0 or row["ranks"] == 1
    assert (tmp_path / "out/scaling.png").stat().st_size > 0
