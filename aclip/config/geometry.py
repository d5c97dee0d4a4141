"""Patches, blocks and how many of them a recipe keeps, and the bytes of a batch, without a tower:
workers build none."""

import math
import re

from aclip.config.recipe import Recipe
from aclip.errors import ConfigError

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


def count_kept_blocks(grid: int, block_size: int, keep_ratio: float) -> int:
    """The share `keep_ratio` of a view's blocks, rounded up: 25 of 49 at 0.5."""
    num_blocks = (grid // block_size) ** 2
    # 0.28 * 25 is 7.000000000000001 in floats, and that is not eight blocks.
    return math.ceil(keep_ratio * num_blocks - 1e-9)


def kept_blocks(recipe: Recipe, grid: int) -> int:
    """How many blocks of a student view with `grid` patches per side the recipe keeps."""
    return count_kept_blocks(grid, recipe.mask.block_size, recipe.mask.keep_ratio)


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
