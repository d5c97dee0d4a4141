"""Says once, at a run's start, that its GPUs wait for the host, which launches their work."""

from aclip.config.recipe import Recipe
from aclip.distributed import say, world_size

SKIPPED, LOOKED_AT = 5, 20
"""Steps: the first ones compile kernels, so the host is slow in them whatever the batch."""
DATA_WAIT_PERCENT = 5
"""With more than that a GPU is idle because data are late, which the progress lines say."""


class HostBound:
    """Counts in how many of a run's first steps the GPU was done before the next was launched."""

    def __init__(self, recipe: Recipe, zero_stage: int):
        self._local_batch_size = recipe.train.global_batch_size // world_size()
        self._may_compile = not recipe.model.compile and zero_stage < 3
        self._looks: list[bool] = []

    def look(self, was_ready: bool | None, data_wait_percent: float | None) -> None:
        """Looks at a step that was launched while the one before ran.

        Args:
            was_ready: whether the one before had ended by then; None where nothing was looked at.
            data_wait_percent: share of the last steps' time that waited for data.
        """
        if was_ready is None or len(self._looks) == SKIPPED + LOOKED_AT:
            return
        self._looks.append(was_ready)
        idle = sum(self._looks[SKIPPED:])
        waits_for_data = (data_wait_percent or 0.0) > DATA_WAIT_PERCENT
        if len(self._looks) < SKIPPED + LOOKED_AT or idle < 0.9 * LOOKED_AT or waits_for_data:
            return
        also = ", and model.compile=true saves launches" if self._may_compile else ""
        say(
            f"host-bound: in {idle} of {LOOKED_AT} steps the GPU was done before the host had "
            f"launched the next; {self._local_batch_size} images a GPU are few: fewer GPUs or a "
            f"larger train.global_batch_size give each GPU more{also}"
        )
