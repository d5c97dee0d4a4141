"""What the doctor knows of a node, and the problems that it shows."""

from dataclasses import dataclass, field
from pathlib import Path

from aclip.cli import GIB
from aclip.nodes.hostfile import Host
from aclip.nodes.probe import BUSY_MIB

MOST_SKEW_SECONDS = 2.0
LEAST_DISK_BYTES = 5 * GIB


@dataclass
class Examined:
    """What is known of a node.

    Attributes:
        host: its line of the hostfile.
        token: the name of the file that it writes to the run folder.
        answer: what probe.examine() returned there; None when no answer came.
        skew: seconds that its clock is ahead of this node's.
        problems: sentences without the node's name.
    """

    host: Host
    token: str
    answer: dict | None = None
    skew: float = 0.0
    problems: list[str] = field(default_factory=list)


def compare(nodes: list[Examined], output: Path, shm_of_slot: int) -> None:
    """Adds the problems that show when a node is compared with the first one that answered, or with
    what a run needs."""
    answered = [node for node in nodes if node.answer is not None]
    with_gpus = any(node.answer["gpus"] for node in answered)
    for node in answered:
        first, answer = answered[0], node.answer
        for name, version in answer["versions"].items():
            expected = first.answer["versions"][name]
            if version != expected:
                node.problems.append(
                    f"has {name} {version}, but {first.host.name} has {expected}; install the same"
                )
        if answer["seen"] and first.answer["seen"] and first.token not in answer["seen"]:
            node.problems.append(
                f"does not see what {first.host.name} writes to the run folder {output}; "
                "put --output on a file system that all nodes share"
            )
        if abs(node.skew) > MOST_SKEW_SECONDS:
            node.problems.append(
                f"its clock is {node.skew:+.1f} s off this node's; synchronise it (chrony, ntpd)"
            )
        if answer["disk_bytes"] < LEAST_DISK_BYTES:
            node.problems.append(
                f"the run folder {output} has {answer['disk_bytes'] / GIB:.2f} GiB left; free "
                f"{LEAST_DISK_BYTES / GIB:.0f} GiB or give another --output"
            )
        needed = node.host.slots * shm_of_slot
        if answer["shm_bytes"] < needed:
            node.problems.append(
                f"/dev/shm has {answer['shm_bytes'] / GIB:.2f} GiB left, but the data workers of "
                f"{node.host.slots} ranks put up to {needed / GIB:.2f} GiB there; start the "
                "container with --ipc=host, or enlarge it (docker: --shm-size)"
            )
        node.problems += gpu_problems(node, with_gpus)


def gpu_problems(node: Examined, with_gpus: bool) -> list[str]:
    gpus, slots = node.answer["gpus"], node.host.slots
    if not with_gpus:
        return []
    if len(gpus) < slots:
        return [
            f"shows {len(gpus)} GPUs for slots={slots}; correct the hostfile, CUDA_VISIBLE_DEVICES "
            "or the driver"
        ]
    busy = [str(gpu.get("id", i)) for i, gpu in enumerate(gpus[:slots]) if gpu["used"] > BUSY_MIB]
    if busy:
        return [f"GPU {', '.join(busy)} is in use; end what runs there (nvidia-smi shows it)"]
    return []
