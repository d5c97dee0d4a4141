"""The hostfile and the environment file, in DeepSpeed's formats, with a sentence for each mistake.

node-1 slots=8          # hostfile: a node's name and its GPUs
NCCL_SOCKET_IFNAME=ib0  # .deepspeed_env: a variable for every node
"""

import ipaddress
import os
import re
import socket
from dataclasses import dataclass
from pathlib import Path

from aclip.errors import ConfigError

LOCAL = "localhost"
LOOPBACK = (LOCAL, "localhost.localdomain", "ip6-localhost", "ip6-loopback")
MOST_SLOTS = 1024
"""More than any node has GPUs, and few enough to be listed."""
ENVIRONMENT_FILE = ".deepspeed_env"
PASSED_ON = ("ACLIP", "DS_", "GLOO", "NCCL", "OMP", "PYTHON", "TORCH", "UCX", "WANDB")
"""First letters of the variables of this shell that every node gets."""


@dataclass(frozen=True)
class Host:
    """A line of the hostfile: a node's name or address, perhaps with `user@`, and its ranks."""

    name: str
    slots: int

    @property
    def address(self) -> str:
        """What other nodes reach it by."""
        return self.name.rpartition("@")[2]


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
    """The hosts of the lines that are right, and a sentence for each one that is not.

    This machine, when it stands alone in the file, is `localhost` whatever it is called there.
    """
    try:
        # Windows' editors put a byte order mark in front.
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        return [], [f"hostfile is {path}, which can't be read ({why}); see launch/hostfile.example"]
    hosts: dict[str, Host] = {}
    loopback, problems = "", []
    for number, line in enumerate(text.splitlines(), 1):
        content = line.split("#")[0].strip()
        if not content:
            continue
        where = f"line {number} of {path}"
        match = re.fullmatch(r"(\S+)\s+slots\s*=\s*([0-9]+)", content)
        if match is None:
            problems.append(f"{where} is {content!r}; {_advice(content)}")
            continue
        host = Host(match[1], int(match[2]))
        name, slots = host.name, host.slots
        wrong = _wrong_name(name)
        if wrong is not None:
            problems.append(f"{where} names {name}, {wrong}")
        elif not 0 < slots <= MOST_SLOTS:
            problems.append(
                f"{where} gives {name} slots={slots}; give its number of GPUs or remove it"
            )
        elif host.address.lower() in hosts:
            problems.append(f"{where} names {name} a second time; keep one line with all its GPUs")
        else:
            hosts[host.address.lower()] = host
            if is_loopback(name):
                loopback = f"{where} names {name}"
    if not hosts and not problems:
        problems.append(f"hostfile is {path}, which names no host; write NAME slots=GPUS a line")
    found = list(hosts.values())
    if loopback and len(found) > 1:
        problems.append(
            f"{loopback} beside other nodes, which means another node on each; give its name or "
            "address"
        )
    if len(found) == 1 and not problems and is_this_machine(found[0].name):
        found = [Host(LOCAL, found[0].slots)]
    return found, problems


def _advice(content: str) -> str:
    """How a line in another tool's notation is written here."""
    if match := re.fullmatch(r"(\S+)\s+(?:.*\s)?slots\s*=\s*(\d+)\s.*", content):
        return f"leave the rest out and write {match[1]} slots={match[2]}"
    if match := re.fullmatch(r"([^\s:]+):(\d+)", content):
        return f"write it as {match[1]} slots={match[2]}"
    return "write it as NAME slots=GPUS"


def _wrong_name(name: str) -> str | None:
    """Why a name can't be reached, with what to do; None if it can be one."""
    address = name.rpartition("@")[2]
    if re.search(r"[\[\]{}]", name):
        return (
            "which is not the name of one node; give each node a line, as `scontrol show "
            "hostnames` lists them, and an IPv6 address without brackets"
        )
    if _ip_address(address) is not None or re.fullmatch(r"([\w.+-]+@)?\w[\w.-]*", name):
        return None
    if ":" in address:
        return "which holds a port; give ssh its port in ~/.ssh/config"
    return "which is not the name of a node; write it as NAME slots=GPUS"


def is_loopback(name: str) -> bool:
    """Whether a name means another machine on each node."""
    address = _ip_address(name)
    return name.lower() in LOOPBACK or (address is not None and address.is_loopback)


def is_this_machine(name: str) -> bool:
    """Whether a name, or a literal address, is this machine's own. Asks no name server but for a
    name that begins like this machine's."""
    if is_loopback(name):
        return True
    address = _ip_address(name)
    if address is not None:
        family = socket.AF_INET if address.version == 4 else socket.AF_INET6
        try:
            with socket.socket(family) as probe:
                probe.bind((name, 0))
        except OSError:
            return False
        return True
    own = socket.gethostname().lower()
    if name.lower() == own:
        return True
    same_start = name.lower().split(".")[0] == own.split(".")[0]
    return same_start and name.lower() in (own.split(".")[0], socket.getfqdn().lower())


def _ip_address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


def environment_for_nodes() -> dict[str, str]:
    """The variables that every node gets: this shell's with PASSED_ON, then the environment files.

    The files are `.deepspeed_env` (or DS_ENV_FILE's name) in the home folder and here, as DeepSpeed
    reads them; the later one wins.

    Raises:
        ConfigError: a file can't be read, or a line has no equals sign.
    """
    values = {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)}
    for folder in (Path.home(), Path()):
        path = folder / os.environ.get("DS_ENV_FILE", ENVIRONMENT_FILE)
        if path.is_file():
            values.update(_read_environment(path))
    return values


def _read_environment(path: Path) -> dict[str, str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path} can't be read ({why}); write NAME=VALUE a line") from None
    values = {}
    for number, line in enumerate(lines, 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        name, equals, value = line.removeprefix("export ").partition("=")
        if not equals or not name.strip().isidentifier():
            raise ConfigError(f"line {number} of {path} is {line!r}; write it as NAME=VALUE")
        values[name.strip()] = value.strip().strip('"')
    return values
