"""WebDataset shards: which files, how many samples each, and the samples of one shard by position.

A position is the rank of a sample in its tar. Nothing here decodes an image or knows about lanes.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from aclip.config.sections import DataConfig
from aclip.data.shards.counts import count_samples
from aclip.data.shards.found import printable
from aclip.data.shards.patterns import addresses, local_files
from aclip.data.shards.remote import RemoteShards, is_remote
from aclip.data.shards.tar import RawSample, TarShard, describe_members
from aclip.errors import ConfigError
from aclip.files import cache_folder, expand_home

logger = logging.getLogger(__name__)

SKIP_KINDS = (
    "unreadable_image",
    "empty_caption",
    "no_image",
    "no_caption",
    "image_too_small",
    "truncated_shard",
    "unreadable_shard",
    "not_in_index",
)
"""Why a sample can't be used. An image too large to be decoded safely counts as unreadable, and
text over MAX_TEXT_BYTES as no caption."""


@dataclass(frozen=True, slots=True)
class Shard:
    url: str
    num_samples: int
    source: int = 0
    """Index of the shard's source in data.sources."""
    remote: RemoteShards | None = None
    """How the shard is fetched; None for a local file."""

    def prefetch(self) -> None:
        """Begins to fetch the shard in the background, if it is remote."""
        if self.remote is not None:
            self.remote.prefetch(self.url)


@dataclass(frozen=True, slots=True)
class Skip:
    """A sample that can't be used, and why: one of SKIP_KINDS."""

    kind: str
    found: tuple[str, ...] = field(default=(), compare=False)
    """The suffixes that were found where the one that is missing was looked for."""


def list_shards(pattern: str | list[str], field: str) -> list[str]:
    """The shards that a recipe's entry names, in the order given, globs sorted.

    Args:
        pattern: a path, a glob, a folder of tars, braces like {00000..01499}, `pipe:` and a
            command, an address that fsspec understands (both with braces), or a list of those.
        field: the recipe's key, for the error message.

    Raises:
        ConfigError: nothing is named, a glob matches nothing, a file is missing, or a protocol's
            package is; braces stand for too many names, or the first file is compressed. The
            message says what was found.
    """
    patterns = [pattern] if isinstance(pattern, str) else list(pattern)
    if not any(patterns):
        raise ConfigError(f"{field} is empty; give shards, e.g. {field}=/data/{{00000..00099}}.tar")
    urls = []
    for entry in patterns:
        if is_remote(entry):
            urls += addresses(entry, field)
        else:
            urls += local_files(expand_home(entry, field), field)
    return urls


def remote_shards(config: DataConfig) -> RemoteShards:
    """How a recipe fetches its remote shards."""
    cache = expand_home(config.cache, "data.cache")
    folder = Path(cache) if cache else cache_folder() / "shards"
    return RemoteShards(folder.absolute(), round(config.cache_gb * 1e9), config.retries)


def index_shards(urls: list[str], remote: RemoteShards | None = None) -> list[Shard]:
    """Counts the samples of each shard and leaves out, with a warning, shards that hold none.

    Args:
        urls: paths and addresses as list_shards gives them.
        remote: how remote shards are fetched; by default as a recipe's defaults say.

    Raises:
        ConfigError: a sizes.json is malformed, a shard can't be read, or no shard holds a sample.
    """
    remote = remote or remote_shards(DataConfig())
    counts = count_samples(urls, remote)
    for url in urls:
        if counts[url] == 0:
            logger.warning("shard %s holds no sample and is left out", url)
    shards = [
        Shard(url, counts[url], remote=remote if is_remote(url) else None)
        for url in urls
        if counts[url] > 0
    ]
    if not shards:
        first = urls[0]
        found = describe_members(first, remote if is_remote(first) else None)
        raise ConfigError(f"no shard holds a sample: {first} {found}; check the shards")
    return shards


def read_shard(shard: Shard, start: int = 0) -> Iterator[tuple[int, RawSample | Skip]]:
    """Yields (position, sample) from position `start` on, then what the index does not list.

    Every position below shard.num_samples comes exactly once, whatever state the file is in: where
    the tar ends early or is corrupt, the rest comes as Skip("truncated_shard"). Samples beyond the
    index come as Skip("not_in_index") with positions from num_samples on.

    The walk uses tarfile, not webdataset's own stream, which reads every byte that it passes and
    gives no offsets. Here a skipped sample costs one seek a member, and bytes are read when used.
    Where an earlier walk has kept the offsets of samples, fewer than 64 before `start` are walked.

    Raises:
        ShardError: the shard can't be fetched, opened or read.
    """
    position = start = min(start, shard.num_samples)  # what is beyond the index comes in any case
    for sample in TarShard(shard.url, shard.remote).walk(start):
        if position >= shard.num_samples:
            yield position, Skip("not_in_index")
        else:
            yield position, sample if sample.is_complete else Skip("truncated_shard")
        position += 1
    for missing in range(position, shard.num_samples):
        yield missing, Skip("truncated_shard")


def shard_names(urls: list[str]) -> list[str]:
    """A name for each shard: its stem, or its path without suffix if some stems are equal."""
    stems = [printable(Path(url).stem) for url in urls]
    if len(set(stems)) == len(set(urls)):
        return stems
    return [printable(str(Path(url).with_suffix(""))) for url in urls]
