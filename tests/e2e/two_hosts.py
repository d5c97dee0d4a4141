"""Two hosts on one machine: network namespaces with a link between them and an sshd in each."""

import getpass
import os
import shutil
import subprocess
import sys
from pathlib import Path

SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
NEEDED = {"ip": shutil.which("ip"), "sshd": SSHD, "ssh": shutil.which("ssh")}


def why_not() -> str | None:
    """What keeps this machine from having two hosts; None if nothing does."""
    missing = [name for name, path in NEEDED.items() if path is None]
    if missing:
        return f"{', '.join(missing)} not installed (openssh-server, openssh-client, iproute2)"
    if os.geteuid() != 0:
        return "only root makes network namespaces"
    probe = subprocess.run(["ip", "netns", "add", "aclip-probe"], capture_output=True, text=True)
    if probe.returncode:
        return f"no network namespaces here: {probe.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", "aclip-probe"], check=True)
    return None


class TwoHosts:
    """`start` runs a command on the first host; ssh reaches both by their addresses.

    Attributes:
        addresses: of the two. hostfile: names both with a slot each.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        tag = f"{os.getpid() % 100000}"
        self._names = [f"aclip-{tag}-{i}" for i in (1, 2)]
        self._links = [f"ac{tag}{end}" for end in "ab"]
        self.addresses = ["10.77.0.1", "10.77.0.2"]
        self._servers: list[subprocess.Popen] = []
        self.hostfile = folder / "hostfile"
        self.hostfile.write_text("".join(f"{address} slots=1\n" for address in self.addresses))

    def open(self) -> None:
        _ip("link", "add", self._links[0], "type", "veth", "peer", "name", self._links[1])
        for name, link, address in zip(self._names, self._links, self.addresses, strict=True):
            _ip("netns", "add", name)
            _ip("link", "set", link, "netns", name, "name", "eth0")
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")
            _ip("-n", name, "link", "set", "lo", "up")
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd wants it, and only Debian's service makes it
        for key in ("host_key", "user_key"):
            command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / key)]
            subprocess.run(command, check=True)
        options = {
            "HostKey": self.folder / "host_key",
            "AuthorizedKeysFile": self.folder / "user_key.pub",
            "PidFile": "none",
            "StrictModes": "no",
            "UsePAM": "no",
            "PermitRootLogin": "yes",
        }
        words = [f"-o{name}={value}" for name, value in options.items()]
        for name in self._names:
            server = self._inside(name, [SSHD, "-D", "-e", "-f", "/dev/null", *words])
            with open(self.folder / f"{name}.log", "wb") as log:
                self._servers.append(subprocess.Popen(server, stdout=log, stderr=log))

    def close(self) -> None:
        for server in self._servers:
            server.kill()
            server.wait()
        for name in self._names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)

    @property
    def remote_shell(self) -> str:
        return (
            f"ssh -F none -i {self.folder}/user_key -o BatchMode=yes -o ConnectTimeout=10 "
            "-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR "
            f"-o ServerAliveInterval=2 -o ServerAliveCountMax=3 -l {getpass.getuser()}"
        )

    def start(self, *command: str, host: int = 0, **options) -> subprocess.Popen:
        """Starts a command on a host, with its output in a pipe and a process group of its own."""
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True} | options
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return subprocess.Popen(
            self._inside(self._names[host], list(command)),
            env={**os.environ, "PATH": path, **options.pop("env", {})},
            start_new_session=True,
            **options,
        )

    def set_link(self, up: bool) -> None:
        _ip("-n", self._names[1], "link", "set", "eth0", "up" if up else "down")

    def ports(self) -> list[str]:
        """What listens on either host, sshd aside."""
        lines = []
        for name in self._names:
            listed = subprocess.run(
                self._inside(name, ["ss", "-Hltn"]), check=True, capture_output=True, text=True
            )
            lines += [line for line in listed.stdout.splitlines() if ":22 " not in line]
        return lines

    def processes(self) -> list[int]:
        """Everything that runs on either host, sshd and its sessions aside."""
        found = []
        for name in self._names:
            listed = subprocess.run(
                ["ip", "netns", "pids", name], check=True, capture_output=True, text=True
            )
            found += [int(word) for word in listed.stdout.split()]
        return [pid for pid in found if not _is_sshd(pid)]

    def _inside(self, name: str, command: list[str]) -> list[str]:
        return ["ip", "netns", "exec", name, *command]


def _is_sshd(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip().startswith("sshd")
    except OSError:
        return True


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)
