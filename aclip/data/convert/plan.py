"""The plan of a conversion, a SQLite file: which entries become samples, and of which shard.

It is written in one pass over the metadata, so that memory stays flat, keys are compared before any
image is read, and a continued conversion needs no second pass.
"""

import json
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

from aclip.data.convert.entries import FURTHER_CAPTION, Entry, Note, Rejected
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
class Tally:
    """Counts of rejected entries, or of notes, by kind, and the first ones by name."""

    counts: Counter = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, item: Rejected | Note) -> None:
        self.counts[item.kind] += 1
        examples = self.examples.setdefault(item.kind, [])
        if len(examples) < EXAMPLES:
            examples.append(f"{item.key}: {item.why}")

    def merge(self, other: "Tally") -> None:
        """Adds those of a later part of the data set."""
        self.counts.update(other.counts)
        for kind, names in other.examples.items():
            own = self.examples.setdefault(kind, [])
            own += names[: EXAMPLES - len(own)]

    def dump(self) -> dict[str, dict]:
        return {"counts": dict(self.counts), "examples": self.examples}

    @staticmethod
    def load(values: dict[str, dict]) -> "Tally":
        """From what `dump` gives."""
        return Tally(Counter(values["counts"]), values["examples"])


def write_plan(
    path: Path, entries: Iterable[Entry | Rejected | Note], progress: Callable[[int], None]
) -> None:
    """Plans the entries that have a caption. Several of one image become one with all captions; of
    several images with one key the first counts.

    Args:
        path: the file to write, which appears complete.
        entries: a source's entries.
        progress: is called now and then with the number of entries read.
    """
    rejections, notes = Tally(), Tally()
    planned = seen = 0
    with appearing(path) as temporary, closing(sqlite3.connect(temporary)) as database:
        database.executescript(SCHEMA)
        for item in entries:
            if isinstance(item, Note):
                notes.add(item)
                continue
            seen += 1
            if seen % ENTRIES_A_REPORT == 0:
                progress(seen)
            if isinstance(item, Entry):
                item = _usable(item)
            if isinstance(item, Entry):
                item = _insert(database, planned, item)
            if isinstance(item, Rejected):
                rejections.add(item)
            elif isinstance(item, Note):
                notes.add(item)
            else:
                planned += 1
        facts = {
            "planned": planned,
            "seen": seen,
            "rejections": rejections.dump(),
            "notes": notes.dump(),
        }
        database.execute("INSERT INTO counts VALUES (?)", (json.dumps(facts),))
        database.commit()
    progress(seen)


class ConversionPlan:
    """A complete plan, read only.

    Attributes:
        num_planned: entries that are to become samples, numbered from 0.
        num_seen: entries of the source.
        rejections: the entries that were not planned.
        notes: what else was counted.
    """

    def __init__(self, path: Path):
        self._database = sqlite3.connect(
            f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True
        )
        facts = json.loads(self._database.execute("SELECT content FROM counts").fetchone()[0])
        self.num_planned: int = facts["planned"]
        self.num_seen: int = facts["seen"]
        self.rejections = Tally.load(facts["rejections"])
        self.notes = Tally.load(facts["notes"])

    def read(self, first: int, last: int) -> list[Entry]:
        """Entries `first` to `last` - 1."""
        rows = self._database.execute(
            "SELECT key, content FROM entries WHERE number >= ? AND number < ? ORDER BY number",
            (first, last),
        )
        return [_load(key, content) for key, content in rows]


def shard_bounds(num_entries: int, shard_size: int) -> list[int]:
    """Where shards begin and end: the fewest of at most `shard_size` entries, whose lengths differ
    by one at most."""
    shards = -(-num_entries // shard_size)
    return [number * num_entries // shards for number in range(shards + 1)] if shards else [0]


def _usable(entry: Entry) -> Entry | Rejected:
    """The entry with the captions that are not blank."""
    if entry.caption_files:
        return entry
    # Half of a surrogate pair, which JSON can hold, is no text that can be written.
    captions = [text.encode(errors="replace").decode() for text in entry.captions if text.strip()]
    if not captions:
        return Rejected(entry.key, "empty_caption", "every caption is blank")
    return replace(entry, captions=tuple(captions))


def _insert(database: sqlite3.Connection, number: int, entry: Entry) -> Entry | Note | Rejected:
    """Plans an entry, or adds its captions to the one of its image that is planned already."""
    cursor = database.execute(
        "INSERT OR IGNORE INTO entries VALUES (?, ?, ?)", (number, entry.key, _dump(entry))
    )
    if cursor.rowcount == 1:
        return entry
    (content,) = database.execute(
        "SELECT content FROM entries WHERE key = ?", (entry.key,)
    ).fetchone()
    planned = _load(entry.key, content)
    if (planned.image, planned.member) != (entry.image, entry.member) or entry.caption_files:
        return Rejected(entry.key, "duplicate_key", f"{planned.image} has the key already")
    new = [caption for caption in entry.captions if caption not in planned.captions]
    if not new:
        return Rejected(entry.key, "duplicate_key", "an earlier entry of the image says the same")
    planned = replace(planned, captions=(*planned.captions, *new))
    database.execute("UPDATE entries SET content = ? WHERE key = ?", (_dump(planned), entry.key))
    return Note(entry.key, FURTHER_CAPTION, new[0])


def _dump(entry: Entry) -> str:
    return json.dumps([entry.image, entry.captions, entry.member, entry.caption_files])


def _load(key: str, content: str) -> Entry:
    image, captions, member, caption_files = json.loads(content)
    return Entry(key, image, tuple(captions), member, tuple(caption_files))
