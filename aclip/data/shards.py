"""WebDataset shards: which files, how many samples each, and the samples of one shard by position.

A position is the rank of a sample in its tar. Nothing here decodes an image or knows about lanes.
"""

import glob
import json
import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from braceexpand import braceexpand
from filelock import FileLock

from aclip.data.tar import RawSample, TarShard, unreadable
from aclip.errors import ConfigError

logger = logging.getLogger(__name__)

SKIP_KINDS = (
    "unreadable_image",
    "empty_caption",
    "no_image",
    "no_caption",
    "image_too_small",
    "truncated_shard",
    "not_in_index",
)
"""Why a sample can't be used. An image too large to be decoded safely is an unreadable one."""
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
SIZES_FILE = "sizes.json"
SCAN_THREADS = 8
PROGRESS_SHARDS = 64
"""A scan reports each time it has counted this many shards."""


@dataclass(frozen=True, slots=True)
class Shard:
    url: str
    num_samples: int


@dataclass(frozen=True, slots=True)
class Skip:
    """A sample that can't be used, and why: one of SKIP_KINDS."""

    kind: str


def list_shards(pattern: str | list[str], field: str) -> list[str]:
    """The shard files that a recipe's entry names, in the order given, globs sorted.

    Args:
        pattern: a path, a glob, braces like {00000..01499}, or a list of those.
        field: the recipe's key, for the error message.

    Raises:
        ConfigError: nothing is named, a glob matches nothing, or a file is missing.
    """
    patterns = [pattern] if isinstance(pattern, str) else list(pattern)
    if not any(patterns):
        raise ConfigError(f"{field} is empty; give shards, e.g. {field}=/data/{{00000..00099}}.tar")
    urls = []
    for entry in patterns:
        if entry.startswith("pipe:") or "://" in entry:
            raise ConfigError(f"{field} holds {entry}, but shards are read from local files only")
        for path in _expand_braces(os.path.expanduser(entry), field):
            urls += _existing_files(path, entry, field)
    return urls


def index_shards(urls: list[str], progress: Callable[[str], None] | None = None) -> list[Shard]:
    """Counts the samples of each shard and leaves out, with a warning, shards that hold none.

    Counts come from a `sizes.json` beside the shards where it lists them (webdataset's shard list,
    or open_clip's {name: count}). Other shards are scanned once, header by header; their counts are
    cached by path, size and time in the cache folder, under a lock, so that one rank scans.

    Args:
        urls: files, as list_shards gives them.
        progress: gets a line now and then while many shards are scanned.

    Raises:
        ConfigError: a sizes.json is malformed, a shard can't be read, or no shard holds a sample.
    """
    listed = {}
    for folder in {os.path.dirname(url) for url in urls}:
        listed.update(_read_sizes(folder))
    counts = {url: listed[os.path.abspath(url)] for url in urls if os.path.abspath(url) in listed}
    counts.update(_count_by_scan([url for url in urls if url not in counts], progress))
    for url in urls:
        if counts[url] == 0:
            logger.warning("shard %s holds no sample and is left out", url)
    shards = [Shard(url, counts[url]) for url in urls if counts[url] > 0]
    if not shards:
        raise ConfigError(f"no shard holds a sample, {urls[0]} for one; check the shards")
    return shards


def read_shard(shard: Shard, start: int = 0) -> Iterator[tuple[int, RawSample | Skip]]:
    """Yields (position, sample) from position `start` on, then what the index does not list.

    Every position below shard.num_samples comes exactly once, whatever state the file is in: where
    the tar ends early or is corrupt, the rest comes as Skip("truncated_shard"). Samples beyond the
    index come as Skip("not_in_index") with positions from num_samples on.

    The walk uses tarfile, not webdataset's own stream: that one reads every byte it passes and
    gives no offsets, while here skipped samples cost a seek a member and bytes are read when used.

    Raises:
        ConfigError: the file can't be opened.
    """
    position = 0
    for sample in TarShard(shard.url).walk():
        if position >= shard.num_samples:
            yield position, Skip("not_in_index")
        elif position >= start:
            yield position, sample if sample.is_complete else Skip("truncated_shard")
        position += 1
    for missing in range(max(position, start), shard.num_samples):
        yield missing, Skip("truncated_shard")


def read_image_bytes(sample: RawSample) -> bytes | Skip:
    """The encoded image of a sample: its first member with a suffix of IMAGE_SUFFIXES."""
    for suffix in IMAGE_SUFFIXES:
        if suffix in sample.members:
            return sample.read(suffix)
    return Skip("no_image")


def read_captions(sample: RawSample) -> list[str] | Skip:
    """The captions that are not blank: of json `captions`, else json `caption`, else txt."""
    captions = None
    if "json" in sample.members:
        captions = _captions_of_json(sample.read("json"))
    if captions is None and "txt" in sample.members:
        captions = [sample.read("txt").decode("utf-8", errors="replace")]
    if captions is None:
        return Skip("no_caption")
    return [caption for caption in captions if caption.strip()] or Skip("empty_caption")


def shard_names(urls: list[str]) -> list[str]:
    """A name for each shard: its stem, or its path without suffix where stems repeat."""
    stems = [Path(url).stem for url in urls]
    if len(set(stems)) == len(set(urls)):
        return stems
    return [str(Path(url).with_suffix("")) for url in urls]


def cache_folder() -> Path:
    """Where aclip keeps what it can make again: ACLIP_CACHE, or ~/.cache/aclip."""
    return Path(os.environ.get("ACLIP_CACHE") or Path.home() / ".cache" / "aclip")


def _expand_braces(entry: str, field: str) -> list[str]:
    try:
        return list(braceexpand(entry))
    except ValueError as error:
        raise ConfigError(f"{field} holds {entry}, whose braces do not match: {error}") from None


def _existing_files(path: str, entry: str, field: str) -> list[str]:
    if os.path.isfile(path):
        return [path]
    if glob.has_magic(path):
        matches = sorted(match for match in glob.glob(path) if os.path.isfile(match))
        if matches:
            return matches
        raise ConfigError(f"{field} is {entry}, but no file matches {path}; check the path")
    raise ConfigError(f"{field} is {entry}, but there is no file {path}; check the path")


def _read_sizes(folder: str) -> dict[str, int]:
    """{absolute path: count} of the shards that the folder's sizes.json lists."""
    path = os.path.join(folder, SIZES_FILE)
    if not os.path.isfile(path):
        return {}
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        entries = content.get("shardlist", content) if isinstance(content, dict) else content
        if isinstance(entries, dict):
            entries = [{"url": url, "nsamples": count} for url, count in entries.items()]
        sizes = {entry["url"]: int(entry["nsamples"]) for entry in entries}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is not a list of shards ({type(error).__name__}: {error}); write it as "
            '{"shardlist": [{"url": "00000.tar", "nsamples": 1000}]} or remove it'
        ) from None
    return {os.path.abspath(os.path.join(folder, url)): count for url, count in sizes.items()}


def _count_by_scan(urls: list[str], progress: Callable[[str], None] | None) -> dict[str, int]:
    if not urls:
        return {}
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "shard_counts.lock"):
            return _count_with_cache(urls, folder / "shard_counts.json", progress)
    except OSError as error:
        logger.warning("counts of shards are not cached: %s; set ACLIP_CACHE", error)
        return _scan(urls, progress)


def _count_with_cache(
    urls: list[str], cache_file: Path, progress: Callable[[str], None] | None
) -> dict[str, int]:
    try:
        cached = json.loads(cache_file.read_text())
    except (OSError, ValueError):  # absent, or of a version that wrote something else
        cached = {}
    stamps = {url: _stamp(url) for url in urls}
    scanned = _scan([url for url in urls if stamps[url] not in cached], progress)
    if scanned:
        cached.update({stamps[url]: count for url, count in scanned.items()})
        temporary = cache_file.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(cached))
        os.replace(temporary, cache_file)
    return {url: cached[stamps[url]] for url in urls}


def _stamp(url: str) -> str:
    try:
        status = os.stat(url)
    except OSError as error:
        raise unreadable(url, error) from None
    return f"{os.path.abspath(url)}:{status.st_size}:{status.st_mtime_ns}"


def _scan(urls: list[str], progress: Callable[[str], None] | None) -> dict[str, int]:
    counts = {}
    # Threads, because a scan waits for the file system more than it computes.
    with ThreadPoolExecutor(SCAN_THREADS) as pool:
        for url, count in zip(urls, pool.map(_count_samples, urls), strict=True):
            counts[url] = count
            if progress and len(counts) % PROGRESS_SHARDS == 0:
                progress(f"counting samples: {len(counts)} of {len(urls)} shards")
    return counts


def _count_samples(url: str) -> int:
    source = TarShard(url)
    count = sum(1 for _ in source.walk())
    if source.is_broken:
        logger.warning("shard %s is truncated or corrupt after sample %d", url, count)
    return count


def _captions_of_json(content: bytes) -> list[str] | None:
    try:
        values = json.loads(content)
    except ValueError:
        return None
    if not isinstance(values, dict):
        return None
    captions = values.get("captions")
    if isinstance(captions, list) and captions and all(isinstance(text, str) for text in captions):
        return captions
    return [values["caption"]] if isinstance(values.get("caption"), str) else None
