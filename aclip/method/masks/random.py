"""Blocks are kept at random, uniformly.

Source: FLIP, arXiv:2212.00794, which drops single patches (mask.block_size=1).
"""

from aclip.method.masks.policy import MaskPolicy, Selection, ViewsToMask


def select_random(views: ViewsToMask) -> Selection:
    """Keeps the blocks of the highest noise."""
    return views.by_block(views.noise)


RANDOM = MaskPolicy(
    "random",
    select_random,
    "This run keeps random patches: shown is what attention would keep as well.",
    reads_noise=True,
)
