"""What tells a shard from another one of its name and number of samples, cheaply."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from functools import cache

from aclip.data.shards.listing import Shard
from aclip.data.shards.tar import ShardError, TarShard

READ_BYTES = 2**16
"""How much of each member of a shard's first sample counts."""
THREADS = 8


def shard_marks(shards: list[Shard]) -> list[str | None]:
    """A mark for each shard: its size in bytes, and a digest of its first sample.

    Times do not count, since data are copied, nor does what else a tar says of its members. None
    for a remote shard, which would have to be fetched, and for one that can't be read.
    """
    # Threads, because network file systems answer slowly.
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(lambda shard: None if shard.remote else _mark(shard.url), shards))


@cache  # one start asks for them twice
def _mark(url: str) -> str | None:
    try:
        shard = TarShard(url)
        sample = shard.first()
        digest = hashlib.sha256()
        if sample is not None:
            digest.update(sample.key.encode())
            for suffix, (offset, size) in sample.members.items():
                digest.update(f"\0{suffix} {size}\0".encode(errors="surrogateescape"))
                digest.update(shard.read(offset, min(size, READ_BYTES)))
    except ShardError:
        return None
    return f"{shard.size}-{digest.hexdigest()[:16]}"


def describe_difference(now: str, then: str) -> str:
    """What differs between two marks, for a sentence about the shard of today."""
    size_now, size_then = (mark.partition("-")[0] for mark in (now, then))
    if size_now != size_then:
        return f"it has {int(size_now):,} bytes instead of {int(size_then):,}"
    return "its first sample is another"
