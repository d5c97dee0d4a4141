"""One training sample: a raw sample's caption and views, everything random keyed by its place."""

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from aclip.config.geometry import patch_grid
from aclip.config.recipe import Recipe
from aclip.data.captions import order_keys
from aclip.data.images.augment import draw_augment_params
from aclip.data.images.decode import decode_image
from aclip.data.images.views import Box, crop, cut_ssl_views, draw_boxes, draw_ssl_boxes
from aclip.data.images.whole_images import PixelBuffer, WholeImage, read_whole_image
from aclip.data.lanes.order import Place, sample_rng
from aclip.data.members import read_captions, read_image_bytes, with_found
from aclip.data.reduce import Reducer
from aclip.data.shards.listing import Shard, Skip, shard_names
from aclip.data.shards.tar import RawSample
from aclip.data.stored_scores import DUE, Found, ScoreReader


@dataclass(frozen=True, slots=True)
class Sample:
    """What a batch stacks; see Batch for the arrays' meaning, here without their first dimension.
    What no part of the recipe reads is None, and so are views that are cut on the device."""

    key: str
    caption: str
    student_boxes: np.ndarray
    teacher_box: np.ndarray | None
    augment_params: np.ndarray
    mask_noise: np.ndarray | None
    ssl_params: np.ndarray | None
    term_noise: dict[str, np.ndarray]
    student_views: np.ndarray | None = None
    teacher_view: np.ndarray | None = None
    ssl_views: np.ndarray | None = None
    stored_scores: np.ndarray | None = None
    score_place: np.ndarray | None = None
    to_teach: str = ""
    whole_image: WholeImage | None = None
    others: tuple[str | None, ...] = ()
    """Its other captions, data.captions_per_image - 1; None for each that it lacks."""
    notes: frozenset[str] = frozenset()
    """What is counted about its captions, kinds of captions.note_kinds."""
    token_ids: list[list[int]] | None = None
    """What is kept of the caption and of each of the others, without start and end; None where they
    are not reduced."""


@dataclass(frozen=True, slots=True)
class Draws:
    """All that is random in a sample."""

    caption: str
    boxes: list[Box]
    around: Box
    augment_params: np.ndarray
    mask_noise: np.ndarray | None
    ssl_boxes: list[Box]
    ssl_flips: list[bool]
    ssl_params: np.ndarray | None
    term_noise: dict[str, np.ndarray]
    others: tuple[str | None, ...]
    token_ids: list[list[int]] | None


class SampleMaker:
    """Makes samples as a recipe asks for; the same place in the stream gives the same sample.

    Args:
        recipe: decides views, augmentation and noise, and which images are too small.
        shards: the whole data set's shards; samples are named by their files.
        buffer: gets the pixels of whole images, in the order of the calls; or None.
        scores: says which samples the teacher scores, see ScoreReader; None for all.
        reducer: makes captions shorter; None to leave them whole.
    """

    def __init__(
        self,
        recipe: Recipe,
        shards: list[Shard],
        buffer: PixelBuffer | None = None,
        scores: ScoreReader | None = None,
        reducer: Reducer | None = None,
    ):
        self.recipe = recipe
        self.names = shard_names([shard.url for shard in shards])
        self.sources = [shard.source for shard in shards]
        self.buffer = buffer
        self.scores = scores
        self.reducer = reducer
        self.caption_keys = recipe.caption_keys
        self.grid = patch_grid(recipe)
        self.blocks = self.grid // recipe.mask.block_size
        self.resolution = recipe.model.image.resolution
        self.teacher_resolution = recipe.teacher.resolution if recipe.needs_teacher_view else None
        shapes = {term.name: term.noise_shape(self.grid) for term in recipe.terms}
        self.noise_shapes = {name: shape for name, shape in shapes.items() if shape is not None}

    def make(self, lane: int, place: Place, raw: RawSample) -> Sample | Skip:
        """The sample of `raw`, which stands at that place of a lane."""
        source = self.sources[place.shard]
        rng = sample_rng(self.recipe.train.seed, lane, place.epoch, place.position, source)
        captions = read_captions(raw, order_keys(self.caption_keys[source], rng))
        if isinstance(captions, Skip):
            return with_found(captions, raw)
        image = self._decode(raw)
        if isinstance(image, Skip):
            return with_found(image, raw)
        draws = self._draw(rng, captions, image.height, image.width)
        has_teacher = self.teacher_resolution is not None
        found = Found(DUE if has_teacher else "")
        if self.scores is not None:
            found = self.scores.find(place)
        sample = Sample(
            key=f"{self.names[place.shard]}/{raw.key}",
            caption=draws.caption,
            others=draws.others,
            student_boxes=np.array(draws.boxes, dtype=np.int32),
            teacher_box=np.array(draws.around, dtype=np.int32) if has_teacher else None,
            augment_params=draws.augment_params,
            mask_noise=draws.mask_noise,
            ssl_params=draws.ssl_params,
            term_noise=draws.term_noise,
            stored_scores=found.codes,
            score_place=found.place,
            to_teach=found.to_teach,
            notes=captions.notes,
            token_ids=draws.token_ids,
        )
        return self._with_pixels(sample, image, draws)

    def _decode(self, raw: RawSample) -> Image.Image | WholeImage | Skip:
        content = read_image_bytes(raw)
        if isinstance(content, Skip):
            return content
        data = self.recipe.data
        if data.crops == "device":
            return read_whole_image(content, data.min_image_side, data.max_image_side, self.buffer)
        return decode_image(content, data.min_image_side)

    def _draw(
        self, rng: np.random.Generator, captions: list[str], height: int, width: int
    ) -> Draws:
        """Draws in an order that is part of what a seed means: add new draws at the end. Before
        these comes the order of the keys of captions, where they have probabilities."""
        recipe, views = self.recipe, self.recipe.views
        caption = captions[rng.integers(len(captions))]
        boxes, around = draw_boxes(rng, height, width, views.student, views.scale)
        if recipe.keeps_scores:
            around = 0, 0, height, width  # so that the scores fit the boxes of other epochs
        augment_params = draw_augment_params(rng, recipe.augment, views.student)
        mask_noise = None
        if recipe.needs_mask_noise:
            mask_noise = rng.random((views.student, self.blocks, self.blocks), dtype=np.float32)
        ssl_boxes, ssl_flips, ssl_params = [], [], None
        if views.ssl:
            ssl_boxes, ssl_flips = draw_ssl_boxes(
                rng, height, width, views.ssl, views.ssl_scale, views.ssl_flip_prob
            )
            ssl_params = draw_augment_params(rng, recipe.ssl_augment, views.ssl)
        term_noise = {
            name: rng.random(shape, dtype=np.float32) for name, shape in self.noise_shapes.items()
        }
        others = draw_others(rng, captions, caption, recipe.data.captions_per_image - 1)
        token_ids = None
        if self.reducer is not None:
            # Each has a generator of its own, since how much is drawn depends on the caption.
            token_ids = [
                self.reducer.reduce(text or "", np.random.default_rng(rng.integers(2**63)))
                for text in (caption, *others)
            ]
        return Draws(
            caption=caption,
            boxes=boxes,
            around=around,
            augment_params=augment_params,
            mask_noise=mask_noise,
            ssl_boxes=ssl_boxes,
            ssl_flips=ssl_flips,
            ssl_params=ssl_params,
            term_noise=term_noise,
            others=others,
            token_ids=token_ids,
        )

    def _with_pixels(self, sample: Sample, image: Image.Image | WholeImage, draws: Draws) -> Sample:
        """The sample with its views, or with the whole image that they are cut from later."""
        if isinstance(image, WholeImage):
            if draws.ssl_boxes:
                image = replace(image, ssl_boxes=draws.ssl_boxes, ssl_flips=draws.ssl_flips)
            return replace(sample, whole_image=image)
        teacher_view = ssl_views = None
        if sample.to_teach:
            teacher_view = crop(image, draws.around, self.teacher_resolution)
        if draws.ssl_boxes:
            ssl_views = cut_ssl_views(image, draws.ssl_boxes, draws.ssl_flips, self.resolution)
        return replace(
            sample,
            student_views=np.stack([crop(image, box, self.resolution) for box in draws.boxes]),
            teacher_view=teacher_view,
            ssl_views=ssl_views,
        )


def draw_others(
    rng: np.random.Generator, captions: list[str], caption: str, number: int
) -> tuple[str | None, ...]:
    """So many other captions than the one drawn, all of them different; None where they run out."""
    if number == 0:
        return ()
    others = [text for text in dict.fromkeys(captions) if text != caption]
    drawn = [others[index] for index in rng.permutation(len(others))[:number]]
    return (*drawn, *[None] * (number - len(drawn)))
