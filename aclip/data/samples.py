"""One training sample: a raw sample's caption and views, everything random keyed by its place."""

from dataclasses import dataclass, replace

import numpy as np

from aclip.config.geometry import patch_grid
from aclip.config.recipe import Recipe
from aclip.data.augment import draw_augment_params
from aclip.data.decode import decode_image
from aclip.data.lane_order import sample_rng
from aclip.data.members import read_captions, read_image_bytes
from aclip.data.shards.listing import Shard, Skip, shard_names
from aclip.data.shards.tar import RawSample
from aclip.data.views import (
    Views,
    cut_ssl_views,
    cut_views,
    draw_boxes,
    draw_ssl_boxes,
)
from aclip.data.whole_images import PixelBuffer, WholeImage, read_whole_image


@dataclass(frozen=True, slots=True)
class Sample:
    """What a batch stacks; see Batch for the arrays' meaning, here without their first dimension.
    What no part of the recipe reads is None, and so are views that are cut on the device."""

    key: str
    caption: str
    views: Views
    augment_params: np.ndarray
    mask_noise: np.ndarray | None
    ssl_views: np.ndarray | None
    ssl_params: np.ndarray | None
    distill_noise: np.ndarray | None
    mlm_noise: np.ndarray | None
    whole_image: WholeImage | None = None


class SampleMaker:
    """Makes samples as a recipe asks for; the same place in the stream gives the same sample.

    Args:
        recipe: decides views, augmentation and mask noise, and which images are too small.
        shards: of the whole data set; samples are named by their files.
        buffer: that whole images are decoded into, in the order of the calls; or None.
    """

    def __init__(self, recipe: Recipe, shards: list[Shard], buffer: PixelBuffer | None = None):
        self.recipe = recipe
        self.names = shard_names([shard.url for shard in shards])
        self.sources = [shard.source for shard in shards]
        self.buffer = buffer
        self.grid = patch_grid(recipe)
        self.blocks = self.grid // recipe.mask.block_size

    def make(
        self, lane: int, shard_index: int, raw: RawSample, epoch: int, position: int
    ) -> Sample | Skip:
        """The sample of `raw`, which stands at (epoch, position) of a lane."""
        captions = read_captions(raw)
        if isinstance(captions, Skip):
            return captions
        content = read_image_bytes(raw)
        if isinstance(content, Skip):
            return content
        recipe = self.recipe
        image = whole_image = None
        if recipe.data.crops == "worker":
            image = decode_image(content, recipe.data.min_image_side)
        else:
            whole_image = read_whole_image(
                content, recipe.data.min_image_side, recipe.data.max_image_side, self.buffer
            )
        if isinstance(image, Skip) or isinstance(whole_image, Skip):
            return image or whole_image
        width, height = image.size if image else (whole_image.width, whole_image.height)
        # The order of draws is part of what a seed means: add new ones at the end.
        source = self.sources[shard_index]
        rng = sample_rng(recipe.train.seed, lane, epoch, position, source)
        caption = captions[rng.integers(len(captions))]
        boxes, around = draw_boxes(rng, height, width, recipe.views.student, recipe.views.scale)
        views = cut_views(
            image,
            boxes,
            around,
            recipe.model.image.resolution,
            recipe.teacher.resolution if recipe.needs_teacher_view else None,
        )
        params = draw_augment_params(rng, recipe.augment, recipe.views.student)
        noise = None
        if recipe.mask.policy == "random":
            noise = rng.random((recipe.views.student, self.blocks, self.blocks), dtype=np.float32)
        ssl_views = ssl_params = None
        if recipe.views.ssl:
            config = recipe.views
            ssl_boxes, flips = draw_ssl_boxes(
                rng, height, width, config.ssl, config.ssl_scale, config.ssl_flip_prob
            )
            ssl_params = draw_augment_params(rng, recipe.ssl_augment, config.ssl)
            if image:
                ssl_views = cut_ssl_views(image, ssl_boxes, flips, recipe.model.image.resolution)
            else:
                whole_image = replace(whole_image, ssl_boxes=ssl_boxes, ssl_flips=flips)
        distill_noise = mlm_noise = None
        if recipe.loss.distill > 0:
            distill_noise = rng.random((1, self.grid, self.grid), dtype=np.float32)
        if recipe.loss.mlm > 0:
            mlm_noise = rng.random(recipe.model.text.context_length, dtype=np.float32)
        return Sample(
            f"{self.names[shard_index]}/{raw.key}",
            caption,
            views,
            params,
            noise,
            ssl_views,
            ssl_params,
            distill_noise,
            mlm_noise,
            whole_image,
        )
