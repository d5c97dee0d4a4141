"""Starts this environment's Python on another node, through ssh or what stands in for it."""

import shlex
import shutil
import subprocess
import sys

from aclip.errors import ConfigError
from aclip.nodes.hostfile import LOCAL, is_this_machine

SSH = "ssh -o BatchMode=yes -o ConnectTimeout=10"


def ssh_options(seconds: float) -> str:
    """Lets ssh end when the other side has been silent for so long."""
    return f" -o ServerAliveInterval={max(1, round(seconds / 3))} -o ServerAliveCountMax=3"


def check_remote_shell(remote_shell: str) -> None:
    """Raises ConfigError when it is no command line, or its command is not installed."""
    try:
        words = shlex.split(remote_shell)
    except ValueError as error:
        raise ConfigError(f"--rsh is {remote_shell!r}, which is no command ({error})") from None
    if not words:
        raise ConfigError("--rsh is empty; give a command such as ssh")
    if shutil.which(words[0]) is None:
        raise ConfigError(
            f"--rsh starts {words[0]}, which is not installed here; install it or name another "
            "remote shell"
        )


def is_here(remote_shell: str, host: str) -> bool:
    """Whether a host needs no remote shell: `localhost`, and this machine's own name or address
    unless the user has named another remote shell than ssh, which may enter a container or a job
    step there."""
    return host == LOCAL or (
        remote_shell.startswith(SSH) and "@" not in host and is_this_machine(host)
    )


def open_python(remote_shell: str, host: str, module: str, **options) -> subprocess.Popen:
    """Starts `python -m module` on a host.

    Args:
        remote_shell: called with the host and the command behind it, as ssh is; `{host}` in it
            stands for the host instead.
        options: what subprocess.Popen takes besides the command.
    """
    command = [sys.executable, "-m", module]
    if not is_here(remote_shell, host):
        words = shlex.split(remote_shell)
        if "{host}" in remote_shell:
            words = [word.replace("{host}", host) for word in words]
        else:
            words.append(host)
        command = [*words, *command]
    return subprocess.Popen(command, **options)
