"""How many lanes the samples are dealt to, and how many workers a rank reads its lanes with."""

from aclip.errors import ConfigError

MAX_LANES = 1024
"""Lanes by default at most: each holds a block of samples that wait and a shard that is open."""
MAX_WORKERS = 16


def resolve_lanes(lanes: int | None, global_batch_size: int) -> int:
    """The number of lanes: as given, or the batch's largest divisor up to MAX_LANES.

    It depends neither on the number of ranks, so that a run keeps its order on another number, nor
    on the shards.

    Raises:
        ConfigError: `lanes` does not divide the batch.
    """
    if lanes is None:
        most = min(MAX_LANES, global_batch_size)
        return next(count for count in range(most, 0, -1) if global_batch_size % count == 0)
    if global_batch_size % lanes:
        raise ConfigError(
            f"data.lanes is {lanes}, which does not divide train.global_batch_size "
            f"{global_batch_size}; set data.lanes to a divisor, or leave it empty"
        )
    return lanes


def resolve_workers(workers: int | None, lanes: int, world_size: int, cores_per_rank: int) -> int:
    """A rank's number of workers: as given, or the largest that its cores and lanes allow.

    Raises:
        ConfigError: ranks x workers does not divide the lanes; 0 workers count as 1.
    """
    if lanes % world_size:
        raise ConfigError(
            f"{world_size} ranks do not divide the {lanes} data lanes; run on "
            f"{_nearest_divisors(lanes, world_size)} ranks, or, in a new run, set data.lanes to a "
            "multiple of the ranks that divides train.global_batch_size"
        )
    per_rank = lanes // world_size
    if workers is None:
        most = max(1, min(MAX_WORKERS, cores_per_rank, per_rank))
        return next(count for count in range(most, 0, -1) if per_rank % count == 0)
    if per_rank % max(1, workers):
        raise ConfigError(
            f"data.workers is {workers}, which does not divide the {per_rank} data lanes of each "
            f"of the {world_size} ranks; set data.workers to "
            f"{_nearest_divisors(per_rank, workers)}, or leave it empty"
        )
    return workers


def _nearest_divisors(number: int, wanted: int) -> str:
    divisors = [count for count in range(1, number + 1) if number % count == 0]
    below = [count for count in divisors if count <= wanted][-1:]
    above = [count for count in divisors if count > wanted][:1]
    return " or ".join(str(count) for count in below + above)
