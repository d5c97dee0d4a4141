"""How a recipe deals the samples of its shards to lanes."""

from aclip.config.recipe import Recipe
from aclip.data.lanes.counts import resolve_lanes
from aclip.data.lanes.mixing import Turns, deal_sources
from aclip.data.lanes.order import SourceOrder, describe_rest
from aclip.data.shards.listing import Shard


def deal(recipe: Recipe, shards: list[Shard]) -> tuple[list[SourceOrder], Turns | None]:
    """The orders of a recipe's sources, and whose turn it is, see deal_sources."""
    weights = [source.weight for source in recipe.data.sources] or [1.0]
    sizes: list[dict[int, int]] = [{} for _ in weights]
    for index, shard in enumerate(shards):
        sizes[shard.source][index] = shard.num_samples
    batch_size, seed = recipe.train.global_batch_size, recipe.train.seed
    return deal_sources(sizes, weights, batch_size, count_lanes(recipe), seed)


def describe_rests(recipe: Recipe, shards: list[Shard]) -> list[str]:
    """How many samples an epoch leaves out and where they come in, a sentence for each source."""
    (first, *_), turns = deal(recipe, shards)
    if turns is None:
        return [describe_rest(first.num_samples, recipe.train.global_batch_size)]
    sources = range(len(recipe.data.sources))
    return [f"data.sources.{source}: {turns.describe_rest(source)}" for source in sources]


def count_lanes(recipe: Recipe) -> int:
    """The lanes that a recipe's data are dealt to, see resolve_lanes."""
    return resolve_lanes(recipe.data.lanes, recipe.train.global_batch_size)
