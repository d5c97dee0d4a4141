"""A node as the supervisor and the doctor see it: an agent at the other end of a remote shell."""

import contextlib
import json
import subprocess
import threading
from collections.abc import Callable

from aclip.nodes.hostfile import Host
from aclip.nodes.remote_shell import open_python

CONNECTION_LOST = 255
"""ssh's own status."""


class Node:
    """Runs commands on a host through an agent; see agent.py.

    Args:
        remote_shell: see open_python.
        host: the node and its ranks.
        spec: what the agent reads first.
        on_line: is called in a thread with each line of output and its line end.
    """

    def __init__(self, remote_shell: str, host: Host, spec: dict, on_line: Callable[[bytes], None]):
        self.host = host
        self._on_line = on_line
        self._process = open_python(
            remote_shell,
            host.name,
            "aclip.nodes.agent",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for the supervisor, which tells the agents
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.tell(json.dumps(spec).encode() + b"\n")

    @property
    def status(self) -> int | None:
        """None while it runs; 128 + n for an end by signal n."""
        status = self._process.poll()
        return status if status is None or status >= 0 else 128 - status

    def tell(self, message: bytes) -> None:
        """Sends bytes to the agent; one that is ending misses them, as its status will show."""
        with contextlib.suppress(OSError):
            self._process.stdin.write(message)
            self._process.stdin.flush()

    def end(self, seconds: float) -> None:
        """Lets the agent kill what it started; after `seconds` only the connection is closed."""
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join(1.0)

    def _read(self) -> None:
        for line in self._process.stdout:
            self._on_line(line)
