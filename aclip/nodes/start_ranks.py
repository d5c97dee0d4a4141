"""On a node: starts DeepSpeed's launcher on the GPUs that the node's environment shows.

The launcher sets CUDA_VISIBLE_DEVICES to the numbers that it is told, whatever the variable was
before. So the node's own numbers are put in here, where its environment is known.
"""

import base64
import json
import os
import sys

from aclip.cli import run_reporting_errors
from aclip.errors import ConfigError

VISIBLE = "CUDA_VISIBLE_DEVICES"
NO_DEVICE = "-1"


def visible_devices(value: str | None) -> list[str] | None:
    """The GPUs that a value of CUDA_VISIBLE_DEVICES shows, as numbers or UUIDs; None for all."""
    if value is None:
        return None
    words = [word.strip() for word in value.split(",")]
    hidden = next((i for i, word in enumerate(words) if word in ("", NO_DEVICE)), len(words))
    return words[:hidden]


def devices_of_ranks(slots: int, value: str | None) -> list[int] | list[str]:
    """A device for each rank of a node, where CUDA_VISIBLE_DEVICES has a value.

    Raises:
        ConfigError: it shows fewer GPUs than the node has slots.
    """
    shown = visible_devices(value)
    if shown is None:
        return list(range(slots))
    if not shown:  # a run on the CPU stays one
        return [NO_DEVICE] * slots
    if len(shown) < slots:
        raise ConfigError(
            f"{VISIBLE} is {value}, which shows {len(shown)} GPUs for slots={slots}; show more, or "
            "correct the hostfile"
        )
    return shown[:slots]


def command(slots: dict[str, int], node_rank: int, words: list[str]) -> list[str]:
    """The words that start this module on the node of that rank.

    Args:
        slots: of each node, by its name, in the hostfile's order.
        words: more arguments of DeepSpeed's launcher, then the script and its arguments.
    """
    this = [sys.executable, "-m", "aclip.nodes.start_ranks", json.dumps(slots), str(node_rank)]
    return [*this, *words]


def main() -> None:
    slots, node_rank, words = json.loads(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    world: dict[str, list] = {name: list(range(number)) for name, number in slots.items()}
    own = list(world)[node_rank]
    world[own] = devices_of_ranks(slots[own], os.environ.get(VISIBLE))
    encoded = base64.urlsafe_b64encode(json.dumps(world).encode()).decode()
    launcher = [sys.executable, "-u", "-m", "deepspeed.launcher.launch"]
    told = [f"--world_info={encoded}", f"--node_rank={node_rank}", "--quiet"]
    os.execv(sys.executable, [*launcher, *told, *words])


if __name__ == "__main__":
    run_reporting_errors(main)
