"""A recipe's shards: found, counted, the same on every rank."""

import hashlib
from dataclasses import replace

import torch.distributed as dist

from aclip.config.arguments import DEMO
from aclip.config.recipe import Recipe
from aclip.data.demo import ensure_demo_data
from aclip.data.shards.listing import Shard, index_shards, list_shards, remote_shards
from aclip.distributed import world_size
from aclip.errors import ConfigError


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

    def find(pattern, field: str) -> list[Shard]:
        return index_shards(list_shards(pattern, field), remote)

    if not recipe.data.sources:
        shards = find(train, "data.train")
    else:
        shards = [
            replace(shard, source=index)
            for index, source in enumerate(recipe.data.sources)
            for shard in find(source.shards, f"data.sources.{index}.shards")
        ]
    return shards, find(val, "data.val") if val else []


def check_same_shards(shards: list[Shard]) -> None:
    """Refuses data that differ between ranks: they would take samples twice and leave out others.

    Raises:
        ConfigError: on every rank, if two ranks see different data.
    """
    if world_size() == 1:
        return
    content = "\n".join(f"{s.url} {s.num_samples} {s.source}" for s in shards)
    samples = sum(shard.num_samples for shard in shards)
    mine = (hashlib.sha256(content.encode()).hexdigest(), len(shards), samples)
    every: list[tuple[str, int, int]] = [mine] * world_size()
    dist.all_gather_object(every, mine)
    for other, seen in enumerate(every):
        if seen[0] != every[0][0]:
            raise ConfigError(
                f"data.train and data.val give {every[0][1]} shards with {every[0][2]} samples on "
                f"rank 0, but {seen[1]} with {seen[2]} on rank {other}; let all nodes see the same "
                "shards and sizes.json"
            )
