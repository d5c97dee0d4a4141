"""A recipe's shards: found, counted, the same on every rank."""

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

from aclip.config.arguments import DEMO
from aclip.config.caption_keys import split_key
from aclip.config.recipe import Recipe
from aclip.data.demo import ensure_demo_data
from aclip.data.members import IMAGE_SUFFIXES, found_in
from aclip.data.shards.found import list_suffixes
from aclip.data.shards.listing import (
    Shard,
    Skip,
    index_shards,
    list_shards,
    read_shard,
    remote_shards,
)
from aclip.data.shards.remote import is_remote
from aclip.data.shards.tar import RawSample, ShardError
from aclip.distributed import gather_objects
from aclip.errors import ConfigError

TEXTS = ("txt", "json")
LOOKED_INTO, LOOKED_AT = 8, 1000
"""The most shards, spread over all, and samples in them that are looked at for pairs of an image
and a text."""


def find_data(recipe: Recipe) -> tuple[list[Shard], list[Shard]]:
    """The training and the validation shards; makes the demo's on first use.

    Raises:
        ConfigError: shards are missing, or can't be read or counted.
    """
    train, val = recipe.data.train, recipe.data.val
    if train == DEMO:
        demo = ensure_demo_data()
        train, val = demo.train, val or demo.val
    remote = remote_shards(recipe.data)

    def members(source: int) -> tuple[str, ...]:
        keys = recipe.caption_keys[source]
        return tuple(dict.fromkeys(split_key(key)[0] for key in keys)) or TEXTS

    def find(pattern, field: str, text_suffixes: tuple[str, ...]) -> list[Shard]:
        urls = list_shards(pattern, field)
        if any(map(is_remote, urls)):
            remote.check()
        shards = index_shards(urls, remote)
        check_pairs(shards, field, text_suffixes)
        return shards

    if not recipe.data.sources:
        shards = find(train, "data.train", members(0))
    else:
        shards = [
            replace(shard, source=index)
            for index, source in enumerate(recipe.data.sources)
            for shard in find(source.shards, f"data.sources.{index}.shards", members(index))
        ]
    return shards, find(val, "data.val", (*TEXTS, "cls")) if val else []


def check_pairs(shards: list[Shard], field: str, text_suffixes: tuple[str, ...]) -> None:
    """Refuses shards in which no sample has an image and a text, as far as one looks.

    Looks at LOOKED_AT samples of up to LOOKED_INTO shards, and no further than the first pair.
    Remote shards are not fetched for that: a lane that finds nothing usable says the same.

    Raises:
        ConfigError: says what was found instead.
    """
    looked_into = shards[:: -(-len(shards) // LOOKED_INTO)]
    if any(shard.remote is not None for shard in looked_into):
        return
    found, keys = Counter(), Counter()
    for shard in looked_into:
        for _, raw in islice(_readable(shard), LOOKED_AT // len(looked_into)):
            if isinstance(raw, Skip):
                return  # damage is counted where it is read
            has_image = not raw.members.keys().isdisjoint(IMAGE_SUFFIXES)
            if has_image and not raw.members.keys().isdisjoint(text_suffixes):
                return
            found.update(found_in(raw))
            keys[shard.url, raw.key] += 1
    texts = " or ".join(f"KEY.{suffix}" for suffix in text_suffixes)
    apart = "; the members of one KEY lie apart: pack them with tar --sort=name"
    raise ConfigError(
        f"{field} gives no image with a text in the first {keys.total():,} samples of "
        f"{looked_into[0].url}{' and others' if len(looked_into) > 1 else ''}; found "
        f"were {list_suffixes(found)}; a sample is KEY.{IMAGE_SUFFIXES[0]} (or "
        f"{', '.join(IMAGE_SUFFIXES[1:])}) beside {texts}, with a KEY that ends at the first dot"
        f"{apart if max(keys.values()) > 1 else ''}"
    )


def _readable(shard: Shard) -> Iterator[tuple[int, RawSample | Skip]]:
    # A shard that can't be read ends the run later, or is skipped, as data.on_shard_error says.
    try:
        yield from read_shard(shard)
    except ShardError:
        yield 0, Skip("unreadable_shard")


def check_same_shards(shards: list[Shard]) -> None:
    """Refuses data that differ between ranks: they would take samples twice and leave out others.

    Raises:
        ConfigError: on every rank, if two ranks see different data.
    """
    content = "\n".join(f"{s.url} {s.num_samples} {s.source}" for s in shards)
    samples = sum(shard.num_samples for shard in shards)
    digest = hashlib.sha256(content.encode(errors="surrogateescape")).hexdigest()
    every: list[tuple[str, int, int]] = gather_objects((digest, len(shards), samples))
    for other, seen in enumerate(every):
        if seen[0] != every[0][0]:
            raise ConfigError(
                f"training and validation have {every[0][1]} shards with {every[0][2]} samples on "
                f"rank 0, but {seen[1]} with {seen[2]} on rank {other}; let all nodes see the same "
                "shards and sizes.json"
            )
