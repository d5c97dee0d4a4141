"""How many samples each shard holds: from a sizes file, else by a scan whose result is kept."""

import json
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from filelock import FileLock

from aclip.data.shards.remote import RemoteShards, is_remote
from aclip.data.shards.tar import TarShard, unreadable
from aclip.errors import ConfigError, NotWritten
from aclip.files import cache_folder, make_folder, write_whole

logger = logging.getLogger(__name__)

SIZES_FILE = "sizes.json"
SCAN_THREADS = 8
PROGRESS_SHARDS = 64
"""A scan reports each time it has counted this many shards."""


def count_samples(urls: list[str], remote: RemoteShards) -> dict[str, int]:
    """The number of samples of each shard, by its url.

    Counts come from a `sizes.json` beside the shards where it lists them (webdataset's shard list,
    or open_clip's {name: count}). Other shards are scanned once, header by header; their counts are
    cached by path, size and time in the cache folder, under a lock, so that one rank scans. Remote
    ones are fetched for that, and their counts cached by address.

    Args:
        urls: paths and addresses as list_shards gives them.
        remote: how remote shards are fetched.

    Raises:
        ConfigError: a sizes.json is malformed, or a shard can't be read.
    """
    listed = {}
    for folder in {_folder(url) for url in urls}:
        listed.update(_read_sizes(folder, remote))
    counts = {url: listed[_full(url)] for url in urls if _full(url) in listed}
    counts.update(_count_by_scan([url for url in urls if url not in counts], remote))
    return counts


def _folder(url: str) -> str:
    """The folder where a shard's sizes.json lies; empty for a command, which has none."""
    if url.startswith("pipe:"):
        return ""
    return _full(url).rpartition("/")[0]


def _full(url: str) -> str:
    """An absolute path, or an address without its query."""
    return url.partition("?")[0] if is_remote(url) else os.path.abspath(url)


def _read_sizes(folder: str, remote: RemoteShards) -> dict[str, int]:
    """{full path or address: count} of the shards that the folder's sizes.json lists."""
    path = f"{folder}/{SIZES_FILE}"
    text = None
    try:
        if is_remote(folder):
            text = remote.read_text(path)
        elif folder and os.path.isfile(path):
            text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise unreadable(path, error) from None
    if text is None:
        return {}
    try:
        content = json.loads(text)
        entries = content.get("shardlist", content) if isinstance(content, dict) else content
        if isinstance(entries, dict):
            entries = [{"url": url, "nsamples": count} for url, count in entries.items()]
        sizes = {entry["url"]: int(entry["nsamples"]) for entry in entries}
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is not a list of shards ({type(error).__name__}: {error}); write it as "
            '{"shardlist": [{"url": "00000.tar", "nsamples": 1000}]} or remove it'
        ) from None
    full = {url if is_remote(url) else f"{folder}/{url}": count for url, count in sizes.items()}
    return {_full(url): count for url, count in full.items()}


def _count_by_scan(urls: list[str], remote: RemoteShards) -> dict[str, int]:
    if not urls:
        return {}
    folder = cache_folder()
    with ExitStack() as stack:
        try:
            make_folder(folder)
            stack.enter_context(FileLock(folder / "shard_counts.lock"))
        except (OSError, NotWritten) as error:
            _warn_not_cached(error)
            return _scan(urls, remote)
        return _count_with_cache(urls, folder / "shard_counts.json", remote)


def _count_with_cache(urls: list[str], cache_file: Path, remote: RemoteShards) -> dict[str, int]:
    try:
        cached = json.loads(cache_file.read_text())
    except (OSError, ValueError):  # absent, or of a version that wrote something else
        cached = {}
    stamps = {url: _stamp(url) for url in urls}
    scanned = _scan([url for url in urls if stamps[url] not in cached], remote)
    if scanned:
        cached.update({stamps[url]: count for url, count in scanned.items()})
        try:
            write_whole(cache_file, json.dumps(cached))
        except NotWritten as error:
            _warn_not_cached(error)
    return {url: cached[stamps[url]] for url in urls}


def _warn_not_cached(error: Exception) -> None:
    logger.warning("counts of shards are not cached: %s; set ACLIP_CACHE", error)


def _stamp(url: str) -> str:
    if is_remote(url):
        return url
    try:
        status = os.stat(url)
    except OSError as error:
        raise unreadable(url, error) from None
    return f"{os.path.abspath(url)}:{status.st_size}:{status.st_mtime_ns}"


def _scan(urls: list[str], remote: RemoteShards) -> dict[str, int]:
    num_remote = sum(map(is_remote, urls))
    if num_remote:
        logger.warning(
            "%d remote shards are fetched whole to count their samples, %s for one; a %s beside "
            "them would save that",
            num_remote,
            next(filter(is_remote, urls)),
            SIZES_FILE,
        )
    counts = {}
    # Threads, because a scan waits for the file system more than it computes.
    with ThreadPoolExecutor(SCAN_THREADS) as pool:
        scans = pool.map(lambda url: _scan_shard(url, remote), urls)
        for url, count in zip(urls, scans, strict=True):
            counts[url] = count
            if len(counts) % PROGRESS_SHARDS == 0:
                # Imported here: it brings torch, which takes seconds, and who only lists shards,
                # as the nodes' probe does, never comes here.
                from aclip.distributed import say

                say(f"counting samples: {len(counts)} of {len(urls)} shards")
    return counts


def _scan_shard(url: str, remote: RemoteShards) -> int:
    source = TarShard(url, remote if is_remote(url) else None)
    count = sum(1 for _ in source.walk())
    if source.is_broken:
        logger.warning("shard %s is truncated or corrupt after sample %d", url, count)
    return count
