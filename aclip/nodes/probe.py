"""What a node says of itself; doctor.py asks, over the standard input of this module.

The first line is JSON, {"folder", "output", "shards", "token", "tokens", "master_addr",
"master_port", "listens", "environment"}; the answer is a line of JSON, see examine(). Then each
`time` is answered with this clock's, until the input ends.
"""

import errno
import hashlib
import json
import math
import os
import runpy
import shutil
import socket
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from aclip.data.shards.listing import list_shards
from aclip.data.shards.remote import check_readable, is_remote
from aclip.data.shards.tar import unreadable
from aclip.errors import ConfigError
from aclip.machine import compiler_problems
from aclip.nodes.start_ranks import VISIBLE, visible_devices

PACKAGES = ("torch", "deepspeed", "timm", "transformers")
SECONDS_TO_SEE = 10.0
"""A file that another node has written may take so long to be seen over a network."""
BUSY_MIB = 1024
"""Memory in use above which a GPU counts as somebody's."""
QUERY = ("nvidia-smi", "--query-gpu=name,memory.used,memory.total", "--format=csv,noheader,nounits")


def examine(question: dict) -> dict:
    """Versions, GPUs, room, and a sentence in `problems` for what this node alone can tell."""
    os.chdir(question["folder"])
    output = Path(question["output"])
    problems = []
    seen = []
    try:
        output.mkdir(parents=True, exist_ok=True)
        token = output / question["token"]
        token.touch()
        seen = _wait_for(output, question["tokens"])
    except OSError as error:
        problems.append(
            f"the run folder {output} can't be written ({error.strerror}); give another --output"
        )
    for field, pattern in question["shards"]:
        problems += _check_shards(field, pattern)
    problems += _check_master(question)
    found = shown_gpus(gpus(), question["environment"].get(VISIBLE, os.environ.get(VISIBLE)))
    if found:
        problems += compiler_problems()
    room = next(path for path in (output, *output.absolute().parents) if path.exists())
    return {
        "versions": _versions(),
        "gpus": found,
        "disk_bytes": shutil.disk_usage(room).free,
        "shm_bytes": shutil.disk_usage("/dev/shm").free,
        "seen": seen,
        "problems": problems,
    }


def _wait_for(folder: Path, tokens: list[str]) -> list[str]:
    """The tokens that are there, after a while at most."""
    deadline = time.monotonic() + SECONDS_TO_SEE
    while True:
        # Listing the folder, not asking for names: network file systems remember absent ones.
        seen = sorted(set(os.listdir(folder)) & set(tokens))
        if len(seen) == len(tokens) or time.monotonic() > deadline:
            return seen
        time.sleep(0.1)


def _check_shards(field: str, pattern: str | list[str]) -> list[str]:
    """The problem of the first shard of a recipe's entry, if there is one."""
    try:
        first = list_shards(pattern, field)[0]
        if is_remote(first):
            check_readable(first)
        else:
            with open(first, "rb") as file:
                file.read(512)
    except ConfigError as error:
        return [str(error)]
    except OSError as error:
        return [str(unreadable(first, error))]
    return []


def _check_master(question: dict) -> list[str]:
    address, port = question["master_addr"], question["master_port"]
    try:
        socket.getaddrinfo(address, port)
    except socket.gaierror as error:
        return [
            f"the first node's name {address} is not known here ({error.strerror}); give an "
            "address with --master_addr"
        ]
    if not question["listens"]:
        return []
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            return [f"port {port} is in use; stop what listens there or give another --master_port"]
    return []


def _versions() -> dict[str, str]:
    found = {"python": ".".join(map(str, sys.version_info[:3])), "aclip": _own_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    torch = find_spec("torch")
    # Read, not imported: torch takes seconds.
    cuda = (
        runpy.run_path(str(Path(torch.origin).with_name("version.py")))["cuda"] if torch else None
    )
    return found | {"cuda": cuda or "none"}


def _own_version() -> str:
    """The release and a digest of the sources, which a checkout changes without a release."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(path.read_bytes())
    return f"{version('aclip')}+{digest.hexdigest()[:8]}"


def gpus() -> list[dict]:
    """Name and memory, MiB, of each GPU of this node; NaN, which counts as free, if unknown."""
    if shutil.which(QUERY[0]) is None:
        return []
    listed = subprocess.run(QUERY, capture_output=True, text=True)
    rows = [line.rsplit(",", 2) for line in listed.stdout.splitlines() if line.count(",") >= 2]
    return [{"name": name, "used": _mib(used), "total": _mib(all_)} for name, used, all_ in rows]


def shown_gpus(all_gpus: list[dict], value: str | None) -> list[dict]:
    """Those that a value of CUDA_VISIBLE_DEVICES shows, each with its number or UUID as `id`.

    One that is given by its UUID is not looked up, and counts as free.
    """
    shown = visible_devices(value)
    if shown is None or not all_gpus:
        return all_gpus
    known = {str(number): gpu for number, gpu in enumerate(all_gpus)}
    unknown = {"name": "GPU", "used": math.nan, "total": math.nan}
    present = [name for name in shown if name in known or not name.isdigit()]
    return [known.get(name, unknown) | {"id": name} for name in present]


def _mib(text: str) -> float:
    try:
        return float(text)
    except ValueError:  # [N/A] where the memory is the CPU's, [Insufficient Permissions]
        return math.nan


def main() -> None:
    question = json.loads(sys.stdin.readline())
    print(json.dumps(examine(question)), flush=True)
    for _ in sys.stdin:
        print(time.time(), flush=True)
    (Path(question["output"]) / question["token"]).unlink(missing_ok=True)


if __name__ == "__main__":
    main()
