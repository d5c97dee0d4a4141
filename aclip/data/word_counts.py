"""How often each word comes in a data set's captions: counted, kept beside the shards, and read."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from filelock import FileLock

from aclip.config.arguments import DEMO
from aclip.config.recipe import Recipe
from aclip.data.members import read_captions
from aclip.data.shards.listing import Shard, Skip, remote_shards
from aclip.data.shards.remote import RemoteShards, is_remote
from aclip.data.shards.tar import TarShard
from aclip.data.tokenizer import Tokenizer
from aclip.distributed import say
from aclip.errors import ConfigError
from aclip.files import expand_home, write_whole

COUNTS_FILE = "word_counts.json"
WORDS = "words"
ADVICE = (
    "make it with python launch/convert.py word-counts SHARDS, and name it as text.word_counts "
    "where it does not lie beside the shards"
)
LEAST = 5
"""Words that come less often are left out, of the file and of the number of all words."""


@dataclass
class WordCounts:
    """What was counted.

    Attributes:
        words: how often each word comes.
        captions, samples: how many were read.
        without_caption: samples of which no caption could be read.
        broken: shards that are truncated or corrupt, which were read as far as they go.
    """

    words: Counter[str] = field(default_factory=Counter)
    captions: int = 0
    samples: int = 0
    without_caption: int = 0
    broken: list[str] = field(default_factory=list)

    def add(self, other: "WordCounts") -> None:
        self.words.update(other.words)
        self.captions += other.captions
        self.samples += other.samples
        self.without_caption += other.without_caption
        self.broken += other.broken

    def write(self, path: Path) -> int:
        """Writes the words that come LEAST times, the most frequent first; returns their number.

        Raises:
            NotWritten: the file can't be written.
        """
        often = {word: count for word, count in self.words.items() if count >= LEAST}
        ordered = dict(sorted(often.items(), key=lambda item: (-item[1], item[0])))
        facts = {"captions": self.captions, "least": LEAST}
        write_whole(path, json.dumps(facts | {WORDS: ordered}, ensure_ascii=False, indent=0))
        return len(ordered)


def count_words(
    url: str, keys: Sequence[str] = (), remote: RemoteShards | None = None
) -> WordCounts:
    """Counts the words of a shard's captions; no image is read.

    Args:
        keys: of these keys of captions, see data.captions, all are counted that a sample has;
            without keys its captions as training reads them by default.
        remote: how to fetch the shard; None for a local file.

    Raises:
        ShardError: the shard can't be fetched, opened or read.
    """
    counts, tokenizer = WordCounts(), _tokenizer()
    shard = TarShard(url, remote)
    for sample in shard.walk():
        if not sample.is_complete:
            shard.is_broken = True
            break
        counts.samples += 1
        found = [read_captions(sample, (key,)) for key in keys] or [read_captions(sample)]
        captions = [text for each in found if not isinstance(each, Skip) for text in each]
        counts.without_caption += not captions
        counts.captions += len(captions)
        for caption in captions:
            counts.words.update(tokenizer.words(caption))
    if shard.is_broken:
        counts.broken.append(url)
    return counts


@cache
def _tokenizer() -> Tokenizer:
    return Tokenizer(context_length=77)  # one for all shards, since its tables take time to load


def drop_probabilities(counts: Mapping[str, int], threshold: float) -> dict[str, float]:
    """The probability max(0, 1 - sqrt(t / f)) of each word that comes LEAST times.

    Args:
        counts: how often each word comes.
        threshold: t; f is a word's share of all words that come LEAST times.
    """
    often = {word: count for word, count in counts.items() if count >= LEAST}
    total = sum(often.values())
    return {
        word: max(0.0, 1 - math.sqrt(threshold * total / count)) for word, count in often.items()
    }


def find_word_counts(recipe: Recipe, shards: list[Shard]) -> Counter[str]:
    """The counts of the file that text.word_counts names; without it, of COUNTS_FILE beside the
    shards, added up over their folders. For the built-in scenes it is made on first use.

    Raises:
        ConfigError: there is no such file, or it holds no counts.
    """
    summed: Counter[str] = Counter()
    for path, content in _files(recipe, shards):
        try:
            words = json.loads(content)[WORDS]
            if not words or not all(type(count) is int and count > 0 for count in words.values()):
                raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ConfigError(
                f"{path} holds no counts of words; make it anew with python launch/convert.py "
                "word-counts SHARDS"
            ) from None
        summed.update(words)
    return summed


def word_counts_digest(recipe: Recipe, shards: list[Shard]) -> str:
    """A SHA-256 of the files that `find_word_counts` reads.

    Raises:
        ConfigError: there is no such file.
    """
    contents = (content for _, content in _files(recipe, shards))
    return hashlib.sha256(b"".join(contents)).hexdigest()


def folder_of(url: str) -> str:
    """The folder of a shard; empty for a command, which has none."""
    if url.startswith("pipe:"):
        return ""
    return url.partition("?")[0].rpartition("/")[0] if is_remote(url) else str(Path(url).parent)


def _files(recipe: Recipe, shards: list[Shard]) -> list[tuple[str, bytes]]:
    """The path and the content of each file of counts."""
    remote = remote_shards(recipe.data)
    given = expand_home(recipe.text.word_counts, "text.word_counts")
    if given:
        content = _read(given, remote)
        if content is None:
            raise ConfigError(f"text.word_counts is {given}, but there is no such file; {ADVICE}")
        return [(given, content)]
    if recipe.data.train == DEMO:
        _count_demo(shards)
    found = []
    for folder in dict.fromkeys(folder_of(shard.url) for shard in shards):
        path = f"{folder}/{COUNTS_FILE}"
        content = _read(path, remote) if folder else None
        if content is None:
            where = f"in {folder}" if folder else "beside a command"
            raise ConfigError(
                f"text.reduce is frequency, but there is no {COUNTS_FILE} {where}; {ADVICE}"
            )
        found.append((path, content))
    return found


def _read(path: str, remote: RemoteShards) -> bytes | None:
    """The content of a file; None if there is no such file."""
    try:
        if is_remote(path):
            text = remote.read_text(path)
            return None if text is None else text.encode()
        return Path(path).read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(
            f"{path} can't be read ({error.strerror or error}); check the file of word counts"
        ) from None


def _count_demo(shards: list[Shard]) -> None:
    """Counts the words of the built-in scenes, unless that was done; one process does it."""
    folder = Path(shards[0].url).parent
    path = folder / COUNTS_FILE
    if path.is_file():
        return
    try:
        with FileLock(folder.with_suffix(".words.lock")):
            if not path.is_file():
                say(f"counting the words of the demo data into {path}, once")
                counts = WordCounts()
                for shard in shards:
                    counts.add(count_words(shard.url))
                counts.write(path)
    except OSError as error:
        raise ConfigError(
            f"the words of the demo data can't be counted into {path} ({error.strerror or error}); "
            "set ACLIP_CACHE to a folder that can be written"
        ) from None
