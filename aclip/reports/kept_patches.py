"""What the masks keep of given samples, for pictures and as a share of objects whose pixels are
known."""

import io
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from aclip.config.geometry import kept_blocks
from aclip.config.recipe import MaskConfig, Recipe
from aclip.config.sections import AugmentConfig, TeacherConfig
from aclip.data.images.augment import augment
from aclip.data.images.decode import decode_image
from aclip.data.lanes.order import Place
from aclip.data.members import read_captions, read_image_bytes
from aclip.data.samples import Sample, SampleMaker
from aclip.data.shards.listing import Shard, Skip
from aclip.data.shards.tar import RawSample
from aclip.method.losses.terms import no_auxiliary_terms
from aclip.method.masks.noise import noise_share
from aclip.method.masks.policies import POLICIES
from aclip.method.masks.policy import ViewsToMask, kept_patches, select_patches
from aclip.reports.mask_pictures import MAX_SAMPLES, Column, picture_columns

OBJECT_MASK = "mask.png"
"""Suffix of a sample's member that is white where the object named by its caption is."""
OBJECT_COVERAGE = 0.25
"""A patch is the object's when the object covers this share of it."""

DATA_OF_PICTURES = {"crops": "worker", "captions": [], "sources": []}
"""Keys of data for pictures: views are cut on the CPU, and captions read as evaluation does."""


@dataclass(frozen=True)
class PictureSet:
    """n samples with V views each, as the run would cut them, and what can be kept of them.

    Attributes:
        images: (n, 3, T, T) uint8, the teacher views.
        captions: n texts.
        is_captioned: (n,) bool; without a caption the sample's key stands for one.
        student_views: (n, V, 3, R, R) uint8.
        colors: how the views are normalised.
        teacher_box: (n, 4) int32, pixels of the source image.
        view_boxes: (n, V, 4) int32, pixels of the source image.
        noise: (n, V, b, b) fp32 for policies that read it, b blocks per side.
        coverage: (n, V, G, G) fp32, share of each patch that the object covers; NaN where the
            sample has no object mask.
        mask: how many blocks of which size are kept, and how noise takes part.
        skipped: how many samples can't be used, by kind.
    """

    images: Tensor
    captions: list[str]
    is_captioned: Tensor
    student_views: Tensor
    colors: AugmentConfig
    teacher_box: Tensor
    view_boxes: Tensor
    noise: Tensor
    coverage: Tensor
    mask: MaskConfig
    skipped: Counter

    def views(self, policy: str, scores: Tensor | None, progress: float = 1.0) -> ViewsToMask:
        """What a policy reads at some progress of a run, the attention (n, g, g) on the images
        without noise beside it."""
        grid = self.coverage.shape[-1]
        return ViewsToMask(
            grid,
            kept_blocks(self.mask, grid, progress),
            self.mask.block_size,
            pixels=self._pixels() if POLICIES[policy].reads_pixels else None,
            noise=self.noise,
            teacher_scores=scores,
            teacher_box=self.teacher_box,
            view_boxes=self.view_boxes,
            progress=progress,
            keys=self.mask,
        )

    def keep_ids(self, policy: str, scores: Tensor | None = None, progress: float = 1.0) -> Tensor:
        """What a policy keeps by the attention (n, g, g) on the images, at some progress of a run:
        (n, V, K) int64."""
        views = replace(
            self.views(policy, scores, progress),
            noise_share=self._noise_share(progress),
            temperature=self.mask.temperature,
        )
        selection = select_patches(POLICIES[policy], views)
        return kept_patches(selection, views.grid)

    def _noise_share(self, progress: float) -> float:
        return noise_share(progress, self.mask.warmup, self.mask.warmup_change)

    def _pixels(self) -> Tensor:
        """The student views as the student would see them without colour changes."""
        views = augment(self.student_views.flatten(0, 1), None, self.colors, torch.float32)
        return views.unflatten(0, self.student_views.shape[:2])

    def columns(
        self,
        policy: str,
        scores: Tensor | None,
        attention_of: str = "teacher",
        progress: float = 1.0,
    ) -> list[Column]:
        """The pictures of the first eight samples, with a random mask beside any other policy."""
        share = self._noise_share(progress)
        words = "patches kept"
        if POLICIES[policy].reads_teacher and share:
            words = "kept at random" if share == 1 else f"kept, {100 * share:.0f} % noise"
        random_ids = None
        if policy != "random":
            random_ids = self.keep_ids("random", progress=progress)[:, 0].numpy()
        return picture_columns(
            self.images.numpy(),
            None if scores is None else scores.numpy(),
            self.student_views.numpy(),
            self.keep_ids(policy, scores, progress).numpy(),
            self.coverage.shape[-1],
            random_ids,
            attention_of,
            words,
        )


def read_picture_set(
    recipe: Recipe,
    raw_samples: Iterable[RawSample | Skip],
    num_measured: int = 0,
    needs_objects: bool = True,
) -> PictureSet | None:
    """Makes the first eight usable samples, and more to measure on.

    Args:
        recipe: the run's recipe; if it keeps all patches, half of them are kept here.
        raw_samples: the samples, which are read as far as needed.
        num_measured: how many samples are wanted.
        needs_objects: whether more than eight are of use only where these have object masks.

    Returns:
        None when no sample can be used.
    """
    recipe = _for_pictures(recipe)
    maker = SampleMaker(recipe, [Shard("samples", 0)])
    samples: list[Sample] = []
    coverage, is_captioned, skipped = [], [], Counter()
    for position, found in enumerate(raw_samples):
        raw = found if isinstance(found, Skip) else _with_caption(found)
        place = Place(0, position, 0, position)
        sample = raw if isinstance(raw, Skip) else maker.make(0, place, raw)
        if not isinstance(sample, Skip):
            covered = _coverage_of(raw, sample, maker.grid)
            sample = covered if isinstance(covered, Skip) else sample
        if isinstance(sample, Skip):
            skipped[sample.kind] += 1
            continue
        samples.append(sample)
        coverage.append(covered)
        is_captioned.append(raw is found)
        is_of_use = not needs_objects or any(not np.isnan(each).any() for each in coverage)
        if len(samples) >= (max(MAX_SAMPLES, num_measured) if is_of_use else MAX_SAMPLES):
            break
    if not samples:
        return None
    student_views = _stack([sample.student_views for sample in samples])
    # Drawn here, since a run draws noise only for a policy that reads it.
    shape = (len(samples), recipe.views.student, maker.blocks, maker.blocks)
    noise = np.random.default_rng(recipe.train.seed).random(shape, dtype=np.float32)
    return PictureSet(
        images=_stack([sample.teacher_view for sample in samples]),
        captions=[sample.caption for sample in samples],
        is_captioned=torch.tensor(is_captioned),
        student_views=student_views,
        colors=recipe.augment,
        teacher_box=_stack([sample.teacher_box for sample in samples]),
        view_boxes=_stack([sample.student_boxes for sample in samples]),
        noise=torch.from_numpy(noise),
        coverage=_stack(coverage),
        mask=recipe.mask,
        skipped=skipped,
    )


def loose_sample(name: str, image: bytes, caption: str) -> RawSample:
    """A sample that lies in no shard."""
    text = caption.encode(errors="replace")
    members = {"jpg": (0, len(image)), "txt": (len(image), len(text))}
    return RawSample(name, members, _Bytes(image + text))


def object_coverage(mask: Image.Image, boxes: np.ndarray, grid: int) -> np.ndarray:
    """How much of each view's patches an object covers.

    Args:
        mask: an image of the source image's size, bright where the object is.
        boxes: (V, 4) int, the views, in pixels of the source image.
        grid: G, patches per side of a view.

    Returns:
        (V, G, G) fp32: share of the pixels whose centre lies in the patch.
    """
    pixels = Image.fromarray((np.asarray(mask.convert("L")) > 127).astype(np.float32))
    size, average = (grid, grid), Image.Resampling.BOX
    regions = ((left, top, left + width, top + height) for top, left, height, width in boxes)
    return np.stack([np.asarray(pixels.resize(size, average, region)) for region in regions])


def kept_object_patches(keep_ids: Tensor, coverage: Tensor) -> tuple[Tensor, Tensor]:
    """Counts the object's patches: those kept and all.

    Args:
        keep_ids: (n, V, K) int64.
        coverage: (n, V, G, G), NaN for unknown.

    Returns:
        Two (n, V) int64; zeros where the object is unknown or outside of the view.
    """
    is_object = coverage.flatten(2) >= OBJECT_COVERAGE
    is_kept = torch.zeros_like(is_object).scatter(2, keep_ids, True)
    return (is_object & is_kept).sum(2), is_object.sum(2)


def kept_object_share(kept: Tensor, total: Tensor) -> float:
    """The share of the object's patches that is kept, mean over the views that show the object.

    Args:
        kept, total: what kept_object_patches returns, with a view that shows an object.
    """
    shows_object = total > 0
    return (kept[shows_object] / total[shows_object]).mean().item()


def _for_pictures(recipe: Recipe) -> Recipe:
    """The recipe with a teacher view and a mask, without what only losses read, with views that are
    cut on the CPU, and with captions as evaluation reads them.

    Views and boxes are the run's: it draws a teacher's box even if it has no teacher.
    """
    resolution = recipe.model.image.resolution
    mask = recipe.mask
    if mask.policy == "none":
        mask = MaskConfig(block_size=mask.block_size)
    elif not recipe.mask_policy.reads_teacher:
        mask = mask.model_copy(update={"policy": "attentive"})
    parts = {
        "mask": mask,
        "teacher": recipe.teacher or TeacherConfig(resolution=resolution),
        "views": recipe.views.model_copy(update={"ssl": 0}),
        "loss": recipe.loss.model_copy(update=no_auxiliary_terms()),
        "data": recipe.data.model_copy(update=DATA_OF_PICTURES),
    }
    recipe = recipe.model_copy(update=parts)
    grid = SampleMaker(recipe, [Shard("samples", 0)]).grid
    if grid % mask.block_size:  # allowed where nothing is dropped
        parts["mask"] = mask.model_copy(update={"block_size": 1})
    return recipe.model_copy(update=parts)


@dataclass(frozen=True)
class _Bytes:
    content: bytes

    def read(self, offset: int, size: int) -> bytes:
        return self.content[offset : offset + size]


def _with_caption(raw: RawSample) -> RawSample | Skip:
    """The sample; without a caption, as in a set with labels alone, its key stands for one."""
    if not isinstance(read_captions(raw), Skip):
        return raw
    image = read_image_bytes(raw)
    return image if isinstance(image, Skip) else loose_sample(raw.key, image, raw.key)


def _coverage_of(raw: RawSample, sample: Sample, grid: int) -> np.ndarray | Skip:
    boxes = sample.student_boxes
    if OBJECT_MASK not in raw.members:
        return np.full((len(boxes), grid, grid), np.nan, dtype=np.float32)
    mask = decode_image(raw.read(OBJECT_MASK))
    if isinstance(mask, Skip):
        return Skip("unreadable_object_mask")
    if mask.size != Image.open(io.BytesIO(read_image_bytes(raw))).size:
        return Skip("object_mask_of_another_size")
    return object_coverage(mask, boxes, grid)


def _stack(arrays: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(arrays))
