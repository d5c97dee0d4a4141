"""A conversion from plan to report: several processes, and the same shards after any kill.

--out holds NNNNN.tar as they are finished; at the end sizes.json, which the loader reads, and
report.json. Until then .conversion/ holds the plan and a line for each finished shard.
"""

import hashlib
import json
import os
import shutil
import sqlite3
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from tqdm import tqdm

from aclip.data.convert.entries import Entry, Source
from aclip.data.convert.images import ImageRule
from aclip.data.convert.plan import ConversionPlan, shard_bounds, write_plan
from aclip.data.convert.pool import ShardTask, write_shards
from aclip.data.convert.report import REPORT_FILE, make_report, write_json
from aclip.data.convert.shard_writer import ShardRecord
from aclip.data.shards.counts import SIZES_FILE
from aclip.errors import ConfigError
from aclip.files import remove_leftovers, write_whole

STATE_FOLDER = ".conversion"
FORMAT_VERSION = 1
"""The version of the shards' format; a conversion that another version began is not continued."""


@dataclass(frozen=True)
class Job:
    """What the shards of a conversion are made of.

    Attributes:
        source: the data set.
        arguments: how the source is read, for the report.
        rule: what is kept of an image.
        shard_size: the most entries of a shard.
        out: the folder of the shards.
    """

    source: Source
    arguments: dict[str, Any]
    rule: ImageRule
    shard_size: int
    out: Path

    def identity(self) -> dict[str, Any]:
        """What a conversion must agree in to be continued.

        Raises:
            ConfigError: a source without metadata can't be read.
        """
        return {
            "format_version": FORMAT_VERSION,
            "arguments": self.arguments,
            "images": asdict(self.rule) | {"folder": str(self.source.images.absolute())},
            "shard_size": self.shard_size,
            "files": _stamps(self.source),
        }


def run(job: Job, processes: int) -> dict[str, Any]:
    """Converts, or continues what an earlier call with the same job began.

    Returns:
        The report.

    Raises:
        ConfigError: --out holds something else, is being written by another conversion, or can't be
            written; the source is malformed; or no sample of it can be used.
    """
    identity = job.identity()
    report = _finished_report(job.out, identity)
    if report is not None:
        print(
            f"{job.out} is already finished, so nothing was read; give another --out, or delete "
            "the folder, to convert again",
            flush=True,
        )
    else:
        state = job.out / STATE_FOLDER
        try:
            _prepare(job.out, state)
            with FileLock(state / "lock", timeout=0):
                report = _convert(job, processes, identity, state)
        except Timeout:
            raise ConfigError(
                f"--out is {job.out}, which another conversion is writing; wait for it, or give "
                "another folder"
            ) from None
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(
                f"--out is {job.out}, which can't be written ({error}); make room, or give another "
                "folder"
            ) from None
    shutil.rmtree(job.out / STATE_FOLDER, ignore_errors=True)
    if report["samples"] == 0:
        raise ConfigError(
            f"no entry of the source became a sample; {job.out / REPORT_FILE} says why"
        )
    return report


def _stamps(source: Source) -> dict[str, Any]:
    """By path, what changes when the metadata do; without metadata, when the folder's files do."""
    if not source.files:
        return {str(source.images.absolute()): _digest(source)}
    stamps = {path: path.stat() for path in source.files}
    return {
        str(path.absolute()): [status.st_size, status.st_mtime_ns]
        for path, status in stamps.items()
    }


def _digest(source: Source) -> str:
    """A digest of path, size and time of every image and caption file, and of what is left out.

    Folders are not in it, since --out may lie in one of them.
    """
    digest = hashlib.sha256()
    for entry in tqdm(source.entries(), desc="looking for changes", unit=" entries"):
        if isinstance(entry, Entry):
            paths = (entry.image, entry.caption_file)
            facts = [(path, _stamp(source.images / path)) for path in paths]
        else:
            facts = [entry.key, entry.kind]
        digest.update(json.dumps(facts).encode() + b"\n")
    return digest.hexdigest()


def _stamp(path: Path) -> list[int] | None:
    try:
        status = path.stat()
    except OSError:  # such as a link to nowhere, which is skipped and counted later
        return None
    return [status.st_size, status.st_mtime_ns]


def _finished_report(out: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    try:
        report = json.loads((out / REPORT_FILE).read_text())
        conversion = report["conversion"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        conversion = None
    if conversion != identity:
        raise _other(out)
    return report


def _prepare(out: Path, state: Path) -> None:
    if out.is_dir() and not state.is_dir() and any(out.iterdir()):
        raise ConfigError(f"--out is {out}, which is not empty; give a new folder")
    state.mkdir(parents=True, exist_ok=True)


def _other(out: Path) -> ConfigError:
    return ConfigError(
        f"--out is {out}, which holds a conversion with other arguments or of files that have "
        "changed since; give the same arguments, or another folder"
    )


def _convert(job: Job, processes: int, identity: dict[str, Any], state: Path) -> dict[str, Any]:
    identity_file = state / "conversion.json"
    if identity_file.exists():
        if json.loads(identity_file.read_text()) != identity:
            raise _other(job.out)
    else:
        write_json(identity_file, identity)
    remove_leftovers(job.out)
    remove_leftovers(state)
    plan_file = state / "plan.sqlite"
    if not plan_file.exists():
        with tqdm(desc="planning", unit=" entries") as bar:
            entries = job.source.entries()
            write_plan(plan_file, entries, lambda seen: bar.update(seen - bar.n))
    plan = ConversionPlan(plan_file)
    bounds = shard_bounds(plan.num_planned, job.shard_size)
    tasks = [
        ShardTask(number, job.out / shard_name(number, len(bounds) - 1), first, last)
        for number, (first, last) in enumerate(pairwise(bounds))
    ]
    records = _Records(state / "finished.jsonl", tasks)
    open_tasks = [task for task in tasks if task.number not in records.finished]
    done = plan.num_planned - sum(task.last - task.first for task in open_tasks)
    for record in write_shards(open_tasks, plan_file, job.source.images, job.rule, processes, done):
        records.add(record)
    finished = [records.finished[task.number] for task in tasks]
    sizes = {task.path.name: records.finished[task.number].samples for task in tasks}
    report = make_report(identity, plan, finished)
    write_json(job.out / SIZES_FILE, sizes)
    write_json(job.out / REPORT_FILE, report)
    return report


def shard_name(number: int, num_shards: int) -> str:
    return f"{number:0{max(5, len(str(num_shards - 1)))}d}.tar"


class _Records:
    """The finished shards, one JSON line each."""

    def __init__(self, path: Path, tasks: list[ShardTask]):
        self.finished: dict[int, ShardRecord] = {}
        for record in _read_records(path):
            tar = tasks[record.number].path
            if tar.is_file() and tar.stat().st_size == record.bytes:
                self.finished[record.number] = record
        # Written anew, since a kill may have left half a line at its end.
        lines = "".join(f"{record.dump()}\n" for record in self.finished.values())
        write_whole(path, lines.encode())
        self._path = path

    def add(self, record: ShardRecord) -> None:
        self.finished[record.number] = record
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(f"{record.dump()}\n")
            file.flush()
            os.fsync(file.fileno())


def _read_records(path: Path) -> Iterator[ShardRecord]:
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                yield ShardRecord(**json.loads(line))
            except ValueError:  # half a line
                return
