"""What a mask policy is: a function from what may be read of the views to scores of their blocks.

Dimensions: B samples, V views, G patches per side of a view, b patches per side of a block,
g = G / b.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from aclip.kernels.attentive_pack import attentive_pack, block_scores
from aclip.method.masks.noise import draw_by_score, mix_with_noise
from aclip.section import Section


@dataclass(frozen=True)
class Selection:
    """Scores and how many blocks are kept by them: what the `attentive_pack` op reads. Blocks with
    the highest scores are kept, the lower index first where scores are equal.

    Attributes:
        scores: with boxes (B, 1, S, S), the teacher's scores of its own view; without (B, V, G, G),
            scores that lie on each student view's grid already. Float, no gradient.
        teacher_box: (B, 4) int32, pixels of the source image, or None.
        view_boxes: (B, V, 4) int32, same convention, or None.
        num_kept_blocks: how many of the g * g blocks of a view are kept.
        block_size: b.
    """

    scores: Tensor
    teacher_box: Tensor | None
    view_boxes: Tensor | None
    num_kept_blocks: int
    block_size: int

    def pack(self, patches: Tensor, cls_token: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Packs the patches that are kept; arguments and results are those of `attentive_pack`."""
        return attentive_pack(
            patches,
            cls_token,
            positions,
            self.scores,
            self.teacher_box,
            self.view_boxes,
            self.num_kept_blocks,
            self.block_size,
        )

    def map(self, change: Callable[[Tensor], Tensor]) -> "Selection":
        """The selection with its tensors changed by `change`."""
        boxes = (self.teacher_box, self.view_boxes)
        teacher_box, view_boxes = (None if box is None else change(box) for box in boxes)
        return replace(
            self, scores=change(self.scores), teacher_box=teacher_box, view_boxes=view_boxes
        )


@dataclass(frozen=True)
class ViewsToMask:
    """What a policy may select from. What a policy does not declare to read may be None.

    Attributes:
        grid: G. num_kept_blocks, block_size: see Selection.
        pixels: (B, V, 3, R, R) normalised, the student views; for a policy that `reads_pixels`.
        noise: (B, V, g, g) uniform in [0, 1), for a policy that `reads_noise`, and where the
            recipe's mask has a warm-up or a temperature.
        teacher_scores: (B, S, S) float, the teacher's attention on its own view; like the boxes
            for a policy that `reads_teacher`.
        teacher_box: (B, 4) int32, pixels of the source image.
        view_boxes: (B, V, 4) int32, same convention.
        progress: how much of the run is done, in [0, 1].
        noise_share: how much noise decides in place of the teacher's scores; see noise.py.
        temperature: the recipe's mask.temperature, for a policy that `reads_teacher`.
        keys: the recipe's mask section, of which a policy reads the `keys` that it declares.
        embeddings: (B, V, P, C) float, the student's patch embeddings, without positions; None
            where the recipe's mask.cluster_embeddings is 0.
    """

    grid: int
    num_kept_blocks: int
    block_size: int
    pixels: Tensor | None = None
    noise: Tensor | None = None
    teacher_scores: Tensor | None = None
    teacher_box: Tensor | None = None
    view_boxes: Tensor | None = None
    progress: float = 0.0
    noise_share: float = 0.0
    temperature: float = 0.0
    keys: Section | None = None
    embeddings: Tensor | None = None

    def by_block(self, scores: Tensor) -> Selection:
        """A selection by scores of the views' blocks, (B, V, g, g)."""
        # The op takes scores per patch; the mean over a block of equal ones is the block's.
        return self.by_patch(self.of_patches(scores))

    def of_patches(self, blocks: Tensor) -> Tensor:
        """Numbers of blocks, (B, V, g, g), as numbers of their patches, (B, V, G, G)."""
        return blocks.repeat_interleave(self.block_size, 2).repeat_interleave(self.block_size, 3)

    def by_patch(self, scores: Tensor) -> Selection:
        """A selection by scores of the views' patches, (B, V, G, G); a block has their mean."""
        return Selection(scores.detach(), None, None, self.num_kept_blocks, self.block_size)

    def by_teacher(self, scores: Tensor, lowest: bool = False) -> Selection:
        """A selection by scores of the teacher view's patches, (B, S, S), seen from each view.

        Args:
            lowest: whether the blocks of the lowest scores are kept, not those of the highest.
        """
        if self.noise_share or self.temperature:
            return self.by_block(self._with_noise(scores, lowest))
        return Selection(
            (-scores if lowest else scores).detach().unsqueeze(1),
            self.teacher_box,
            self.view_boxes,
            self.num_kept_blocks,
            self.block_size,
        )

    def _with_noise(self, scores: Tensor, lowest: bool) -> Tensor:
        """Scores of the views' blocks, (B, V, g, g), in which noise takes part."""
        blocks = block_scores(
            scores.detach().unsqueeze(1),
            self.teacher_box,
            self.view_boxes,
            self.grid,
            self.block_size,
        )
        if self.noise_share:
            blocks = -blocks if lowest else blocks
            return mix_with_noise(blocks, self.noise, self.noise_share)
        return draw_by_score(blocks, self.noise, self.temperature, lowest)


@dataclass(frozen=True)
class MaskPolicy:
    """A way to choose the patches that are kept.

    Attributes:
        name: its value of the recipe's `mask.policy`.
        select: gives the selection of some views; None keeps every patch.
        explanation: what a run with it keeps, a sentence for pages; empty where pictures show it.
        reads_teacher: whether it reads the teacher's scores, so that a teacher runs.
        reads_noise: whether it reads noise, which the data workers draw.
        reads_pixels: whether it reads the views' pixels.
        keys: the keys of the recipe's mask section that it alone reads; None for none.
        inspect: gives metrics of its mask on some views, and a sentence if a key of its own does
            not suit them, else ""; None where there is nothing to tell.
    """

    name: str
    select: Callable[[ViewsToMask], Selection | None]
    explanation: str = ""
    reads_teacher: bool = False
    reads_noise: bool = False
    reads_pixels: bool = False
    keys: type[Section] | None = None
    inspect: Callable[[ViewsToMask], tuple[dict[str, float], str]] | None = None


def select_patches(policy: MaskPolicy, views: ViewsToMask) -> Selection | None:
    """What a policy selects; where noise decides alone, the teacher's scores may be missing."""
    if policy.reads_teacher and views.noise_share == 1:
        return views.by_block(views.noise)
    return policy.select(views)


def kept_patches(selection: Selection, grid: int) -> Tensor:
    """The ids of the patches that `Selection.pack` keeps, without a tower.

    Args:
        grid: G.

    Returns:
        (B, V, K) int64, ascending.
    """
    boxes = selection.view_boxes
    num_samples, num_views = (selection.scores if boxes is None else boxes).shape[:2]
    blank = selection.scores.new_zeros(num_samples * num_views, grid * grid, 1)
    return selection.pack(blank, blank.new_zeros(1), blank.new_zeros(1 + grid * grid, 1))[1]


def other_patches(keep_ids: Tensor, num_patches: int) -> Tensor:
    """The patches that are not kept: (B, K) int64 -> (B, num_patches - K) int64, ascending."""
    kept = keep_ids.new_zeros(len(keep_ids), num_patches, dtype=torch.int8).scatter(1, keep_ids, 1)
    return kept.argsort(dim=1, stable=True)[:, : num_patches - keep_ids.shape[1]]
