"""The words of shards' captions, counted by several processes into one file."""

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

from aclip.config.arguments import DEMO
from aclip.config.caption_keys import split_key
from aclip.config.sections import DataConfig
from aclip.data.convert.pool import end_with_parent
from aclip.data.demo import ensure_demo_data
from aclip.data.progress import progress_bar
from aclip.data.shards.listing import list_shards, remote_shards
from aclip.data.shards.remote import RemoteShards, is_remote
from aclip.data.shards.tar import ShardError
from aclip.data.word_counts import COUNTS_FILE, LEAST, WordCounts, count_words, folder_of
from aclip.errors import ConfigError

NAMED = 10
"""How many broken shards a report names."""


def write_word_counts(
    shards: list[str], out: str | None, keys: Sequence[str], processes: int
) -> str:
    """Counts the words of shards and writes the file that text.word_counts names.

    Each process holds the words of one shard, this one all of them; images are not read.

    Args:
        shards: entries as of data.train, or the word demo for the built-in scenes.
        out: the file, a new one; None for COUNTS_FILE beside the shards.
        keys: keys of captions, all of which are counted; none for a sample's captions as training
            reads them by default.
        processes: how many count at once.

    Returns:
        What was counted, as text.

    Raises:
        ConfigError: no such shards, one can't be read, they hold no word that comes often enough, a
            key is none, or the file exists.
        NotWritten: the file can't be written.
    """
    for key in keys:
        try:
            split_key(key)
        except ValueError as error:
            raise ConfigError(f"--captions is {error}") from None
    urls = ensure_demo_data().train if shards == [DEMO] else list_shards(shards, "SHARDS")
    path = _output(urls, out)
    remote = remote_shards(DataConfig())
    if any(map(is_remote, urls)):
        remote.check()
    counts = WordCounts()
    context = multiprocessing.get_context("fork")  # other ways import the launch script again
    with ProcessPoolExecutor(min(processes, len(urls)), context, end_with_parent) as pool:
        counted = pool.map(partial(_count, keys, remote), urls)
        try:
            for found in progress_bar(counted, desc="counting", total=len(urls), unit=" shards"):
                counts.add(found)
        except BrokenProcessPool:
            raise ConfigError(
                "a process that counts words was killed, by the kernel perhaps for want of memory; "
                "run the command again with a smaller --processes"
            ) from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if max(counts.words.values(), default=0) < LEAST:
        raise ConfigError(
            f"SHARDS is {shards[0]}{' ...' if len(urls) > 1 else ''}, whose {counts.samples:,} "
            f"samples hold {counts.captions:,} captions and no word that comes {LEAST} times; "
            "give the shards of a data set with captions, and with --captions the keys they have"
        )
    num_words = counts.write(path)
    return "\n".join([_summary(counts, num_words, path), *_problems(counts)])


def _count(keys: Sequence[str], remote: RemoteShards, url: str) -> WordCounts:
    try:
        return count_words(url, keys, remote if is_remote(url) else None)
    except ShardError as error:  # can't be handed to another process
        raise ConfigError(str(error)) from None


def _output(urls: list[str], out: str | None) -> Path:
    if out is None:
        folders = sorted({folder_of(url) for url in urls})
        if len(folders) > 1 or not folders[0] or is_remote(folders[0]):
            raise ConfigError(
                f"--output is not given, and the shards lie in {', '.join(folders[:3]) or 'none'}, "
                "which is not one local folder; name the file that is to be written"
            )
        out = f"{folders[0]}/{COUNTS_FILE}"
    if Path(out).exists():
        raise ConfigError(f"--output is {out}, which exists; remove it, or give another file")
    return Path(out)


def _summary(counts: WordCounts, num_words: int, path: Path) -> str:
    return (
        f"{counts.words.total():,} words in {counts.captions:,} captions of {counts.samples:,} "
        f"samples; wrote the {num_words:,} different ones that come {LEAST} times: {path}"
    )


def _problems(counts: WordCounts) -> list[str]:
    lines = []
    if counts.without_caption:
        lines.append(f"{counts.without_caption:,} samples have no caption")
    if counts.broken:
        named = ", ".join(counts.broken[:NAMED])
        lines.append(f"{len(counts.broken):,} shards are truncated or corrupt: {named}")
    return lines
