"""The hostfile and the environment file, in DeepSpeed's formats, with a sentence for each mistake.

node-1 slots=8          # hostfile: a node's name and its GPUs
NCCL_SOCKET_IFNAME=ib0  # .deepspeed_env: a variable for every node
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from aclip.errors import ConfigError

ENVIRONMENT_FILE = ".deepspeed_env"
PASSED_ON = ("ACLIP", "DS_", "GLOO", "NCCL", "OMP", "PYTHON", "TORCH", "UCX", "WANDB")
"""First letters of the variables of this shell that every node gets."""


@dataclass(frozen=True)
class Host:
    """A line of the hostfile: a node's name or address, and its ranks."""

    name: str
    slots: int


def read_hostfile(path: str) -> list[Host]:
    """The hosts in the order of the file.

    Raises:
        ConfigError: no such file, or its first mistake.
    """
    hosts, problems = check_hostfile(path)
    if problems:
        raise ConfigError(problems[0])
    return hosts


def check_hostfile(path: str) -> tuple[list[Host], list[str]]:
    """The hosts of the lines that are right, and a sentence for each one that is not."""
    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        return [], [f"hostfile is {path}, which can't be read ({why}); see hostfile.example"]
    hosts: dict[str, Host] = {}
    problems = []
    for number, line in enumerate(text.splitlines(), 1):
        content = line.split("#")[0].strip()
        if not content:
            continue
        where = f"line {number} of {path}"
        match = re.fullmatch(r"(\S+)\s+slots=(\d+)", content)
        if match is None:
            problems.append(f"{where} is {content!r}; write it as NAME slots=GPUS")
            continue
        name, slots = match[1], int(match[2])
        if slots == 0:
            problems.append(f"{where} gives {name} slots=0; give its number of GPUs or remove it")
        elif name in hosts:
            problems.append(f"{where} names {name} a second time; keep one line with all its GPUs")
        else:
            hosts[name] = Host(name, slots)
    if not hosts and not problems:
        problems.append(f"hostfile is {path}, which names no host; write NAME slots=GPUS a line")
    return list(hosts.values()), problems


def environment_for_nodes() -> dict[str, str]:
    """The variables that every node gets: this shell's with PASSED_ON, then the environment files.

    The files are `.deepspeed_env` (or DS_ENV_FILE's name) in the home folder and here, as DeepSpeed
    reads them; the later one wins.

    Raises:
        ConfigError: a line without an equals sign.
    """
    values = {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)}
    for folder in (Path.home(), Path()):
        path = folder / os.environ.get("DS_ENV_FILE", ENVIRONMENT_FILE)
        if path.is_file():
            values.update(_read_environment(path))
    return values


def _read_environment(path: Path) -> dict[str, str]:
    values = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        name, equals, value = line.partition("=")
        if not equals or not name.strip().isidentifier():
            raise ConfigError(f"line {number} of {path} is {line!r}; write it as NAME=VALUE")
        values[name.strip()] = value.strip().strip('"')
    return values
