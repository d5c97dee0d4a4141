"""The plan of a conversion, a SQLite file: which entries become samples, and of which shard.

It is written in one pass over the metadata, so that memory stays flat, keys are compared before any
image is read, and a continued conversion needs no second pass.
"""

import json
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from aclip.data.convert.entries import Entry, Rejected
from aclip.files import appearing

EXAMPLES = 10
"""How many rejected entries of each kind a report names."""
ENTRIES_A_REPORT = 1000
SCHEMA = """
PRAGMA journal_mode = OFF;
PRAGMA synchronous = OFF;
PRAGMA cache_size = -65536;
CREATE TABLE entries (number INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, content TEXT NOT NULL);
CREATE TABLE counts (content TEXT NOT NULL);
"""


@dataclass
class Rejections:
    """Counts of rejected entries by kind, and the first ones by name."""

    counts: Counter = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, rejected: Rejected) -> None:
        self.counts[rejected.kind] += 1
        examples = self.examples.setdefault(rejected.kind, [])
        if len(examples) < EXAMPLES:
            examples.append(f"{rejected.key}: {rejected.why}")

    def merge(self, counts: dict[str, int], examples: dict[str, list[str]]) -> None:
        """Adds the rejections of a later part of the data set."""
        self.counts.update(counts)
        for kind, names in examples.items():
            own = self.examples.setdefault(kind, [])
            own += names[: EXAMPLES - len(own)]


def write_plan(
    path: Path, entries: Iterable[Entry | Rejected], progress: Callable[[int], None]
) -> None:
    """Plans the entries that have a caption and a key of their own; the first of a key counts.

    Args:
        path: the file to write, which appears complete.
        entries: a source's entries.
        progress: is called now and then with the number of entries read.
    """
    rejections = Rejections()
    planned = seen = 0
    with appearing(path) as temporary, closing(sqlite3.connect(temporary)) as database:
        database.executescript(SCHEMA)
        for seen, entry in enumerate(entries, 1):
            if seen % ENTRIES_A_REPORT == 0:
                progress(seen)
            if isinstance(entry, Entry):
                entry = _usable(entry)
            if isinstance(entry, Entry) and _insert(database, planned, entry):
                planned += 1
            elif isinstance(entry, Entry):
                rejections.add(Rejected(entry.key, "duplicate_key", "an earlier entry has the key"))
            else:
                rejections.add(entry)
        facts = {"planned": planned, "seen": seen} | vars(rejections)
        database.execute("INSERT INTO counts VALUES (?)", (json.dumps(facts),))
        database.commit()
    progress(seen)


class ConversionPlan:
    """A complete plan, read only.

    Attributes:
        num_planned: entries that are to become samples, numbered from 0.
        num_seen: entries of the source.
        rejections: the entries that were not planned.
    """

    def __init__(self, path: Path):
        self._database = sqlite3.connect(
            f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True
        )
        facts = json.loads(self._database.execute("SELECT content FROM counts").fetchone()[0])
        self.num_planned: int = facts["planned"]
        self.num_seen: int = facts["seen"]
        self.rejections = Rejections(Counter(facts["counts"]), facts["examples"])

    def read(self, first: int, last: int) -> list[Entry]:
        """Entries `first` to `last` - 1."""
        rows = self._database.execute(
            "SELECT key, content FROM entries WHERE number >= ? AND number < ? ORDER BY number",
            (first, last),
        )
        entries = []
        for key, content in rows:
            image, captions, member, caption_file = json.loads(content)
            entries.append(Entry(key, image, tuple(captions), member, caption_file))
        return entries


def shard_bounds(num_entries: int, shard_size: int) -> list[int]:
    """Where shards begin and end: the fewest of at most `shard_size` entries, whose lengths differ
    by one at most."""
    shards = -(-num_entries // shard_size)
    return [number * num_entries // shards for number in range(shards + 1)] if shards else [0]


def _usable(entry: Entry) -> Entry | Rejected:
    """The entry with the captions that are not blank."""
    if entry.caption_file is not None:
        return entry
    # Half of a surrogate pair, which JSON can hold, is no text that can be written.
    captions = [text.encode(errors="replace").decode() for text in entry.captions if text.strip()]
    if not captions:
        return Rejected(entry.key, "empty_caption", "every caption is blank")
    return Entry(entry.key, entry.image, tuple(captions), entry.member)


def _insert(database: sqlite3.Connection, number: int, entry: Entry) -> bool:
    content = json.dumps([entry.image, entry.captions, entry.member, entry.caption_file])
    cursor = database.execute(
        "INSERT OR IGNORE INTO entries VALUES (?, ?, ?)", (number, entry.key, content)
    )
    return cursor.rowcount == 1
