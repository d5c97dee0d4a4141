"""A conversion from plan to report: several processes, and the same shards after any kill.

--out holds NNNNN.tar as they are finished; at the end sizes.json, which the loader reads, and
report.json. Until then .conversion/ holds the plan and a line for each finished shard.
"""

import json
import shutil
import sqlite3
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from aclip.data.convert.entries import Source
from aclip.data.convert.identity import differences, stamps
from aclip.data.convert.images import ImageRule
from aclip.data.convert.plan import ConversionPlan, shard_bounds, write_plan
from aclip.data.convert.pool import ShardTask, write_shards
from aclip.data.convert.report import (
    REPORT_FILE,
    format_report,
    make_report,
    say_nothing_was_usable,
    write_json,
)
from aclip.data.convert.shard_writer import ShardRecord
from aclip.data.progress import progress_bar
from aclip.data.shards.counts import SIZES_FILE
from aclip.errors import ConfigError, NotWritten
from aclip.files import (
    append,
    check_writable,
    remove_leftovers,
    sync,
    write_whole,
    writing,
)
from aclip.lock import LOCK_FILE, claim, release

STATE_FOLDER, IDENTITY_FILE = ".conversion", "conversion.json"
FORMAT_VERSION = 2
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
            "files": stamps(self.source),
        }


def run(job: Job, processes: int) -> dict[str, Any]:
    """Converts, or continues what an earlier call with the same job began.

    Returns:
        The report.

    Raises:
        ConfigError: --out holds something else, or is being written by another conversion; the
            source is malformed; or no sample of it can be used, after the reasons were printed.
        NotWritten: --out can't be written.
    """
    identity = job.identity()
    _check_place(job.out)
    report = _finished_report(job.out, identity)
    if report is not None:
        return report
    check_writable(job.out, "--out")
    warning = claim(job.out, "--out", "another conversion")
    if warning is not None:
        print(warning, flush=True)
    try:
        return _finished_report(job.out, identity) or _convert_all(job, processes, identity)
    finally:
        (job.out / LOCK_FILE).unlink(missing_ok=True)
        release(job.out)


def _convert_all(job: Job, processes: int, identity: dict[str, Any]) -> dict[str, Any]:
    state = job.out / STATE_FOLDER
    _prepare(job.out, state, identity)
    try:
        report = _convert(job, processes, identity, state)
    except sqlite3.Error as error:
        raise NotWritten(
            f"--out is {job.out}, where the plan can't be written or read ({error}); make room, or "
            "give another folder"
        ) from None
    if report["samples"] == 0:
        print(format_report(report), flush=True)
        # The corrected command may have the same --out, so nothing but the report stays.
        _clear(job.out)
        write_json(job.out / REPORT_FILE, report)
        raise ConfigError(f"{say_nothing_was_usable(report)} ({job.out / REPORT_FILE} has more)")
    shutil.rmtree(state, ignore_errors=True)
    return report


def _finished_report(out: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The report of a conversion that was finished before, which is said; else None.

    Raises:
        ConfigError: it was another conversion.
    """
    try:
        report = json.loads((out / REPORT_FILE).read_text())
        conversion, samples = report["conversion"], report["samples"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"--out is {out}, whose {REPORT_FILE} is no report of a conversion "
            f"({type(error).__name__}); give another folder"
        ) from None
    if not samples:  # nothing is lost with it
        return None
    if conversion != identity:
        raise _other(out, conversion, identity)
    print(
        f"{out} is already finished, so nothing was read; give another --out, or delete "
        "the folder, to convert again",
        flush=True,
    )
    return report


def _check_place(out: Path) -> None:
    """
    Raises:
        ConfigError: --out, or what it lies in, is a file.
    """
    for place in (out, *out.parents):
        if place.is_dir():
            return
        if place.exists():
            where = "a file" if place == out else f"below {place}, a file"
            raise ConfigError(f"--out is {out}, which is {where}; give a folder")


def _prepare(out: Path, state: Path, identity: dict[str, Any]) -> None:
    """Makes the folder ready to begin or to continue a conversion.

    Raises:
        ConfigError: it holds something else, or finished shards of another conversion.
    """
    if (out / REPORT_FILE).exists():  # of a conversion that gave no sample
        _clear(out)
    if not state.is_dir() and (held := [p for p in out.iterdir() if p.name != LOCK_FILE]):
        shown = ", ".join(sorted(path.name for path in held)[:3])
        raise ConfigError(f"--out is {out}, which is not empty ({shown}); give a new folder")
    identity_file = state / IDENTITY_FILE
    try:
        begun = json.loads(identity_file.read_text())
    except (FileNotFoundError, ValueError):
        begun = None
    if begun == identity:
        return
    if begun is not None and any(out.glob("*.tar")):
        raise _other(out, begun, identity)
    _clear(out)  # nothing was finished, so nothing is lost
    write_json(identity_file, identity)


def _clear(out: Path) -> None:
    """Removes what a conversion without finished samples has written."""
    shutil.rmtree(out / STATE_FOLDER, ignore_errors=True)
    try:
        names = list(json.loads((out / SIZES_FILE).read_text()))
    except (OSError, ValueError):
        names = []
    with writing(out):
        for name in (*names, SIZES_FILE, REPORT_FILE):
            (out / name).unlink(missing_ok=True)


def _other(out: Path, then: dict[str, Any], now: dict[str, Any]) -> ConfigError:
    return ConfigError(
        f"--out is {out}, which holds a conversion with other arguments or of files that have "
        f"changed since ({'; '.join(differences(then, now))}); give the same arguments, or another "
        "folder"
    )


def _convert(job: Job, processes: int, identity: dict[str, Any], state: Path) -> dict[str, Any]:
    remove_leftovers(job.out)
    remove_leftovers(state)
    plan_file = state / "plan.sqlite"
    if not plan_file.exists():
        with progress_bar(desc="planning", unit=" entries") as bar:
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
        append(self._path, f"{record.dump()}\n".encode())
        sync(self._path)


def _read_records(path: Path) -> Iterator[ShardRecord]:
    if path.exists():
        for line in path.read_text().split("\n")[:-1]:
            try:
                yield ShardRecord.load(line)
            except ValueError:  # half a line
                return
