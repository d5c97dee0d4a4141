"""Batches that need no data set, for measurements: noise for images, captions of real lengths."""

import math
from dataclasses import replace
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aclip.config.geometry import patch_grid, teacher_grid
from aclip.config.recipe import Recipe
from aclip.config.text_folder import read_text_folder
from aclip.data.batch import PER_SAMPLE, Batch
from aclip.data.images.augment import draw_augment_params
from aclip.data.stored_scores import DUE
from aclip.method.tokens import END_ID, START_ID, Tokens

# Token counts of YFCC-15M's captions: log-normal with this median and mean.
MEDIAN_LENGTH, MEAN_LENGTH = 12, 20
# Samples in a batch from which one sample's share is measured: so many that what a step keeps once
# for all of them, such as a normalised weight, matters little.
NUM_MEASURED = 32


def caption_lengths(num_captions: int, context_length: int) -> list[int]:
    """Evenly spaced quantiles of the length distribution, tokens with start and end."""
    sigma = math.sqrt(2 * math.log(MEAN_LENGTH / MEDIAN_LENGTH))
    normal = NormalDist(math.log(MEDIAN_LENGTH), sigma)
    lengths = (
        round(math.exp(normal.inv_cdf((i + 0.5) / num_captions))) for i in range(num_captions)
    )
    return [min(max(length, 3), context_length) for length in lengths]


def synthetic_tokens(lengths: list[int], num_columns: int, vocab_size: int = 0) -> Tokens:
    """Captions of these lengths, padded to so many columns.

    Args:
        vocab_size: how many ids there are, if they are not CLIP's.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (len(lengths), num_columns)
    ids = torch.randint(1, vocab_size or START_ID, shape, generator=generator)
    columns = torch.arange(num_columns)
    ends = torch.tensor(lengths).unsqueeze(1) - 1
    ids = ids.masked_fill(columns > ends, 0)
    if not vocab_size:
        ids = ids.masked_fill(columns == ends, END_ID)
        ids[:, 0] = START_ID
    return Tokens(ids, torch.tensor(lengths))


def _vocab_size(recipe: Recipe) -> int:
    """How many ids a text tower of a folder has; 0 for CLIP's."""
    return read_text_folder(recipe.model.text).vocab_size if recipe.model.text.name else 0


def synthetic_batch(recipe: Recipe, batch_size: int, tokens: Tokens | None = None) -> Batch:
    """A batch as the recipe's loader gives it, with what its parts read and nothing else.

    Args:
        tokens: the captions; None for captions of real lengths.
    """
    rng = np.random.default_rng(0)
    views, side, grid = recipe.views, recipe.model.image.resolution, patch_grid(recipe)

    def pixels(*shape: int) -> Tensor:
        return torch.from_numpy(rng.integers(0, 256, shape, dtype=np.uint8))

    def noise(*shape: int) -> Tensor:
        return torch.from_numpy(rng.random(shape, dtype=np.float32))

    def params(config, num_views: int) -> Tensor:
        drawn = [draw_augment_params(rng, config, num_views) for _ in range(batch_size)]
        return torch.from_numpy(np.stack(drawn))

    box = torch.tensor([0, 0, side, side], dtype=torch.int32)
    has_teacher_view = recipe.needs_teacher_view
    teacher_side = recipe.teacher.resolution if has_teacher_view else 0
    blocks = grid // recipe.mask.block_size
    shapes = {term.name: term.noise_shape(grid) for term in recipe.terms}
    context_length = recipe.model.text.context_length
    if tokens is None:
        lengths = caption_lengths(batch_size, context_length)
        tokens = synthetic_tokens(lengths, max(lengths), _vocab_size(recipe))
    return Batch(
        student_views=pixels(batch_size, views.student, 3, side, side),
        teacher_view=pixels(batch_size, 3, teacher_side, teacher_side)
        if has_teacher_view
        else None,
        student_boxes=box.repeat(batch_size, views.student, 1),
        teacher_box=box.repeat(batch_size, 1) if has_teacher_view else None,
        augment_params=params(recipe.augment, views.student),
        mask_noise=noise(batch_size, views.student, blocks, blocks)
        if recipe.needs_mask_noise
        else None,
        ssl_views=pixels(batch_size, views.ssl, 3, side, side) if views.ssl else None,
        ssl_params=params(recipe.ssl_augment, views.ssl) if views.ssl else None,
        term_noise={name: noise(batch_size, *shape) for name, shape in shapes.items() if shape},
        tokens=tokens,
        keys=[str(index) for index in range(batch_size)],
        captions=[""] * batch_size,
        cursors=torch.zeros(1, 3, dtype=torch.int64),
        to_teach=[DUE if has_teacher_view else ""] * batch_size,
    )


def without_teacher_view(recipe: Recipe, batch: Batch) -> Batch:
    """The batch in a step for which the teacher scores nothing: where the recipe keeps scores, with
    those of every sample."""
    codes = None
    if recipe.keeps_scores:
        shape = (len(batch), teacher_grid(recipe), teacher_grid(recipe))
        codes = torch.from_numpy(np.random.default_rng(0).integers(1, 256, shape, dtype=np.uint8))
    to_teach = [""] * len(batch)
    return replace(batch, teacher_view=None, to_teach=to_teach, stored_scores=codes)


def batch_of_mean_captions(
    recipe: Recipe, mean_length: float, num_columns: int, batch_size: int = NUM_MEASURED
) -> Batch:
    """A batch from which one sample's share of a step can be measured.

    Args:
        mean_length: the captions' mean length in tokens, start and end included; rounded to a
            multiple of 1 / batch_size.
        num_columns: the length to which captions are padded.
        batch_size: how many samples. With more than NUM_MEASURED only the captions have values.
    """
    total = round(batch_size * mean_length)
    lengths = [(total + index) // batch_size for index in range(batch_size)]
    tokens = synthetic_tokens(lengths, num_columns, _vocab_size(recipe))
    if batch_size <= NUM_MEASURED:
        return synthetic_batch(recipe, batch_size, tokens)
    one = synthetic_batch(recipe, 1, tokens)

    def enlarged(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: enlarged(each) for name, each in value.items()}
        if isinstance(value, Tensor):
            return value.new_empty(batch_size, *value.shape[1:])
        return value * batch_size if isinstance(value, list) else value

    return replace(one, **{n: enlarged(getattr(one, n)) for n in PER_SAMPLE if n != "tokens"})
