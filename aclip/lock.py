"""A folder has one owner at a time: the process that writes into it."""

import errno
import fcntl
import json
import os
import signal
import socket
import time
from datetime import datetime
from pathlib import Path

from aclip.errors import ConfigError
from aclip.files import writing

LOCK_FILE = ".owner"
_HELD: dict[Path, int] = {}
"""The descriptors of the locks that this process holds: closing one gives its lock up."""
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
LOOK = 0.2
SECONDS_TO_END = 15.0
"""The longest that a killed process is waited for."""
PENDING = ("SigPnd:", "ShdPnd:")
EXITING = 0x4
"""The kernel's flag of a process that has begun to end, see proc(5) and PF_EXITING."""
PATIENCE_VARIABLE = "ACLIP_PATIENCE"
"""Seconds that a start waits for another owner's end; a start by hand doesn't wait."""
PATIENCE = {PATIENCE_VARIABLE: "120"}
"""What a program that starts runs again puts into their environment: processes of the start before
may end late, and a network file system takes up to 90 s to give a lost node's lock up."""


class InUse(ConfigError):
    """Another process owns a folder.

    Attributes:
        owner: what it does there, and where it runs.
    """

    def __init__(self, message: str, owner: str):
        super().__init__(message)
        self.owner = owner


def claim(
    folder: Path, option: str, doing: str, patience: float = 0.0, name: str = LOCK_FILE
) -> str | None:
    """Makes this process the owner of a folder until `release` or its end, however it ends.

    The lock is the kernel's, so no lock is left behind by a killed process, and none is inherited
    by child processes. Network file systems pass it on to other nodes; where a file system knows no
    locks, nothing is hindered, and the caller gets a sentence to print.

    Args:
        folder: must exist and be writable.
        option: gave the folder, such as --output.
        doing: what the owner does there, such as "a run".
        patience: seconds to wait for another owner's end.
        name: the lock's file in the folder, for a folder that has owners of several kinds.

    Returns:
        None, or the sentence about a file system without locks.

    Raises:
        InUse: another process owns the folder; says which one.
        NotWritten: the folder can't be written.
    """
    path = folder.resolve() / name
    if path in _HELD:
        return None
    with writing(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    deadline = time.monotonic() + patience
    while True:
        try:
            # Not flock: children would inherit that one, and outlive their parent with it.
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in NO_LOCKS:
                os.close(descriptor)
                return (
                    f"the file system of {folder} knows no locks ({error.strerror}), so a second "
                    f"start with the same {option} would not be noticed"
                )
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            now, facts = time.monotonic(), _facts(descriptor)
            if now < deadline or (now < deadline + SECONDS_TO_END and _is_ending(facts)):
                time.sleep(LOOK)
                continue
            owner = _describe(facts)
            os.close(descriptor)
            raise InUse(
                f"{option} is {folder}, which {owner} is using; wait for its end, or give another "
                "folder",
                owner,
            ) from None
        break
    facts = {
        "doing": doing,
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.now().isoformat(" ", "seconds"),
    }
    with writing(path):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(facts).encode(), 0)
    _HELD[path] = descriptor
    return None


def release(folder: Path, name: str = LOCK_FILE) -> None:
    """Gives a claimed folder up; does nothing for one that is not claimed."""
    descriptor = _HELD.pop(folder.resolve() / name, None)
    if descriptor is not None:
        os.close(descriptor)


def _facts(descriptor: int) -> dict:
    """What the owner has written about itself; {} where that can't be read."""
    try:
        facts = json.loads(os.pread(descriptor, 4096, 0))
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def _is_ending(facts: dict) -> bool:
    """Whether the owner is a process of this machine that has been killed: one that holds much
    memory takes a moment to end, and has its locks until then."""
    if facts.get("host") != socket.gethostname():
        return False
    folder = Path("/proc", str(facts.get("pid")))
    try:
        fields = (folder / "stat").read_text().rpartition(")")[2].split()
        status = (folder / "status").read_text()
    except OSError:
        return True
    pending = [line.split()[1] for line in status.splitlines() if line[:7] in PENDING]
    is_killed = any(int(mask, 16) >> (signal.SIGKILL - 1) & 1 for mask in pending)
    return is_killed or fields[0] in ("Z", "X") or bool(int(fields[6]) & EXITING)


def _describe(facts: dict) -> str:
    try:
        return "{doing} (process {pid} on {host}, since {since})".format(**facts)
    except KeyError:
        return "another process"
