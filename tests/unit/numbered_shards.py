"""Shards of numbered samples, and what a walk over them gives."""

from aclip.data.shards.listing import Shard, Skip, read_shard

SIZE = 512 + 1024
"""Bytes of a member of `numbered`, header and content."""


def numbered(count: int, first: int = 0) -> list[tuple[str, bytes]]:
    """Samples of one member each."""
    return [(f"{n:05d}.txt", b"%05d" % n + bytes(700)) for n in range(first, first + count)]


def describe(shard: Shard, start: int = 0) -> list[tuple]:
    """All that a walk gives, contents too."""
    return [
        (position, raw.kind)
        if isinstance(raw, Skip)
        else (position, raw.key, [(suffix, raw.read(suffix)) for suffix in raw.members])
        for position, raw in read_shard(shard, start)
    ]


def keys(shard: Shard, start: int = 0) -> list[str]:
    return [raw.key for _, raw in read_shard(shard, start)]
