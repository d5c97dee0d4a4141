"""Patches, blocks and how many of them a recipe keeps, and the bytes of a batch, without a tower:
workers build none."""

import re

from aclip.config.recipe import MaskConfig, Recipe
from aclip.errors import ConfigError
from aclip.method.masks.keep_ratio import count_share, keep_ratio

TYPICAL_PIXELS = 500 * 375
"""Of a photograph in the sets that this field trains on."""


def patch_grid(recipe: Recipe) -> int:
    """Patches per side of a student view, from the recipe alone: workers build no tower.

    Raises:
        ConfigError: the tower's patch size is neither in its keyword arguments nor in its name.
    """
    image = recipe.model.image
    patch = image.kwargs.get("patch_size")
    if patch is None:
        in_name = re.search(r"patch(\d+)", image.name)
        if in_name is None:
            raise ConfigError(
                f"model.image.name is {image.name}, which does not name a patch size; set "
                "model.image.kwargs.patch_size"
            )
        patch = in_name[1]
    return image.resolution // int(patch)


def teacher_grid(recipe: Recipe) -> int:
    """Patches per side of the teacher view, for a recipe that has one; see patch_grid."""
    resolution = recipe.model.image.resolution
    return recipe.teacher.resolution // (resolution // patch_grid(recipe))


def kept_blocks(mask: MaskConfig, grid: int, progress: float) -> int:
    """How many blocks of a student view with `grid` patches per side are kept.

    Args:
        progress: how much of the run is done, in [0, 1].
    """
    share = keep_ratio(progress, mask.keep_ratio, mask.keep_ratio_end, mask.keep_ratio_shape)
    return count_share(share, (grid // mask.block_size) ** 2)


def shared_bytes(recipe: Recipe, local_batch_size: int) -> int:
    """The shared memory that a rank's data workers and the parts on their way to it take: about
    three times the pixels of its part of a batch."""
    resolution = recipe.model.image.resolution
    if recipe.data.crops != "worker":
        pixels = TYPICAL_PIXELS
    else:
        pixels = (recipe.views.student + recipe.views.ssl) * resolution**2
        if recipe.needs_teacher_view:
            pixels += recipe.teacher.resolution**2
    return 3 * local_batch_size * 3 * pixels
