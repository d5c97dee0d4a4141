"""How a recipe's step scales: `launch/benchmark.py --scaling HOSTFILE`.

Steps on synthetic batches with 1, 2, 4, ... of the hostfile's slots. Weak: every rank keeps its
images; strong: the global batch stays. Memory and bytes sent stand beside what the planner says.
"""

import argparse
import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from aclip.benchmarks.scaling_rank import RESULT, SPEC
from aclip.cli import MIB, text_table
from aclip.config.ds_config import DsConfig, read_ds_config
from aclip.config.recipe import Recipe
from aclip.config.recipe_file import load_recipe
from aclip.data.synthetic import synthetic_batch
from aclip.errors import ConfigError
from aclip.files import appearing, check_writable, write_whole
from aclip.nodes.hostfile import LOCAL, Host, environment_for_nodes, read_hostfile
from aclip.nodes.node import Node
from aclip.nodes.remote_shell import SSH, check_remote_shell, is_here
from aclip.planning.plan import plan_memory
from aclip.planning.step_kinds import describe_keep_ratio, teaching_share

LONGEST_SECONDS = 3600.0
WEAK, STRONG = "weak", "strong"


@dataclass(frozen=True)
class Measured:
    """One line of the table.

    Attributes:
        mode: weak or strong.
        ranks: how many ranks took part.
        global_batch_size: images of a step.
        images_per_second: the speed of all ranks together.
        efficiency: that speed as a share of `ranks` times the speed of one rank.
        communication: the share of a step that collectives take.
        memory_mib: the peak on the rank where it is highest.
        planned_mib: what the planner says of it.
    """

    mode: str
    ranks: int
    global_batch_size: int
    images_per_second: float
    efficiency: float
    communication: float
    memory_mib: float
    planned_mib: float


def benchmark_scaling(arguments: argparse.Namespace) -> int:
    """Runs `launch/benchmark.py --scaling`; returns the exit status."""
    if len(arguments.recipes) != 1:
        raise ConfigError(f"--scaling takes one recipe, not {' '.join(arguments.recipes)}")
    (name,) = arguments.recipes
    if arguments.steps < 1:
        raise ConfigError(f"--steps is {arguments.steps}; give 1 or more")
    hosts = read_hostfile(arguments.scaling)
    remote_shell = arguments.rsh or SSH
    if not all(is_here(remote_shell, host.name) for host in hosts):
        check_remote_shell(remote_shell)
    per_rank = arguments.batch_size or (64 if torch.cuda.is_available() else 4)
    total = sum(host.slots for host in hosts)
    counts = rank_counts(total)
    cases = [(WEAK, n, n * per_rank) for n in counts]
    cases += [(STRONG, n, total * per_rank) for n in counts]
    overrides = [*arguments.set, "data.train=demo"]
    # Every case is read before the first one costs time.
    read = [_read(name, overrides, arguments.ds_config, n, size) for _, n, size in cases]
    check_writable(Path(arguments.out), "--out")
    rows: list[Measured] = []
    for (mode, ranks, size), (recipe, ds_config) in zip(cases, read, strict=True):
        print(f"{mode}: {ranks} ranks, {size} images a step", flush=True)
        found = _measure(hosts, ranks, size, name, overrides, arguments)
        batch = synthetic_batch(recipe, size // ranks)
        on_host = not torch.cuda.is_available()
        planned = plan_memory(recipe, ds_config, ranks, batch, on_host)
        speed = found["images_per_second"]
        first = next((row for row in rows if row.mode == mode), None)
        rows.append(
            Measured(
                mode,
                ranks,
                global_batch_size=size,
                images_per_second=speed,
                efficiency=speed / (ranks * first.images_per_second) if first else 1.0,
                communication=found["communication"],
                memory_mib=found["memory_bytes"] / MIB,
                planned_mib=planned / MIB,
            )
        )
    print(format_table(rows))
    share = teaching_share(read[0][0])
    if share < 1:
        print(
            f"Timed were steps in which the teacher scores its view; in a run {share:.0%} are such."
        )
    if num_more := len(read[0][0].stages):
        print(f"Timed were steps of the first stage; the run has {num_more} more.")
    keep_ratio = describe_keep_ratio(read[0][0])
    if keep_ratio:
        print(f"Timed were steps of a run's end: {keep_ratio}. The plan is for those of the most.")
    if not torch.cuda.is_available():
        print(
            "On a CPU only memory that was written to is measured, so that buckets larger than the "
            "model make the plan look too high; lower reduce_bucket_size in the ds_config."
        )
    _write(Path(arguments.out), rows, {"recipe": name, "ds_config": arguments.ds_config})
    return 0


def rank_counts(total: int) -> list[int]:
    """1, 2, 4, ... and `total` itself."""
    return sorted({2**power for power in range(total.bit_length()) if 2**power < total} | {total})


def first_slots(hosts: list[Host], ranks: int) -> list[Host]:
    """The first so many slots of the hosts, in their order."""
    chosen = []
    for host in hosts:
        slots = min(host.slots, ranks)
        if slots:
            chosen.append(Host(host.name, slots))
        ranks -= slots
    return chosen


def format_table(rows: list[Measured]) -> str:
    cells = [["", "ranks", "batch", "img/s", "efficiency", "communication"]]
    cells[0] += ["MiB a rank", "planned", "off"]
    for row in rows:
        line = [row.mode, f"{row.ranks}", f"{row.global_batch_size}"]
        line += [f"{row.images_per_second:.4g}", f"{row.efficiency:.0%}"]
        line += [f"{row.communication:.0%}", f"{row.memory_mib:,.1f}", f"{row.planned_mib:,.1f}"]
        cells.append([*line, f"{row.planned_mib / row.memory_mib - 1:+.1%}"])
    return text_table(cells)


def _read(name, overrides, path, ranks: int, batch_size: int) -> tuple[Recipe, DsConfig]:
    recipe = load_recipe(name, [*overrides, f"train.global_batch_size={batch_size}"])
    return recipe, read_ds_config(path, batch_size, ranks)


def _measure(hosts, ranks: int, batch_size: int, name, overrides, arguments) -> dict:
    """What rank 0 of one case reports.

    Raises:
        RuntimeError: a rank failed; with the end of its output.
    """
    spec = {
        "recipe": name,
        "overrides": [*overrides, f"train.global_batch_size={batch_size}"],
        "ds_config": str(Path(arguments.ds_config).absolute()),
        "steps": arguments.steps,
    }
    chosen, nodes, outputs, first_rank = first_slots(hosts, ranks), [], [], 0
    master = "127.0.0.1" if chosen[0].name == LOCAL else chosen[0].address
    for host in chosen:
        common = {
            SPEC: json.dumps(spec),
            "WORLD_SIZE": str(ranks),
            "LOCAL_SIZE": str(host.slots),
            "MASTER_ADDR": master,
            "MASTER_PORT": str(arguments.master_port),
        }
        commands = [
            {
                "arguments": [sys.executable, "-m", "aclip.benchmarks.scaling_rank"],
                "environment": common | {"RANK": str(first_rank + i), "LOCAL_RANK": str(i)},
            }
            for i in range(host.slots)
        ]
        told = {
            "folder": os.getcwd(),
            "environment": environment_for_nodes(),
            "commands": commands,
            "lost_after": LONGEST_SECONDS,
        }
        outputs.append([])
        nodes.append(Node(arguments.rsh or SSH, host, told, outputs[-1].append))
        first_rank += host.slots
    deadline = time.monotonic() + LONGEST_SECONDS
    while any(node.status is None for node in nodes) and not any(node.status for node in nodes):
        if time.monotonic() > deadline:
            break
        time.sleep(0.2)
    for node in nodes:
        node.end(10.0)
    for node, output in zip(nodes, outputs, strict=True):
        if node.status:
            said = b"".join(output[-20:]).decode(errors="replace")
            raise RuntimeError(f"{node.host.name} ended with status {node.status}:\n{said}")
    found = [line for line in outputs[0] if line.startswith(RESULT.encode())]
    return json.loads(found[-1].decode().removeprefix(RESULT))


def _write(folder: Path, rows: list[Measured], made_of: dict) -> None:
    """scaling.json, scaling.txt and scaling.png."""
    content = {**made_of, "rows": [asdict(row) for row in rows]}
    write_whole(folder / "scaling.json", json.dumps(content, indent=2))
    write_whole(folder / "scaling.txt", format_table(rows) + "\n")
    # Here, since matplotlib takes a second and nothing else needs it.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    speed, memory = figure.subplots(1, 2)
    for mode in (WEAK, STRONG):
        mine = [row for row in rows if row.mode == mode]
        ranks = [row.ranks for row in mine]
        speed.plot(ranks, [row.images_per_second for row in mine], "o-", label=mode)
        ideal = [n * mine[0].images_per_second for n in ranks]
        speed.plot(ranks, ideal, ":", color="grey")
        memory.plot(ranks, [row.memory_mib for row in mine], "o-", label=mode)
        memory.plot(ranks, [row.planned_mib for row in mine], "x:", color="grey")
    speed.set(xlabel="ranks", ylabel="images/s", title="dotted: in proportion to the ranks")
    memory.set(xlabel="ranks", ylabel="MiB a rank", ylim=(0, None), title="dotted: planned")
    for axes in (speed, memory):
        axes.legend()
    with appearing(folder / "scaling.png") as partial:
        figure.savefig(partial, dpi=120, format="png")
    print(f"{folder}/scaling.json, scaling.txt, scaling.png")
