"""What tells whether a mask is blind: whether the teacher attends to what captions speak of.

Dimensions: n samples, V views, G patches per side of a view, K kept patches, E embeds.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from aclip.config.recipe import Recipe
from aclip.kernels.attentive_pack import block_scores
from aclip.method.masks.attentive import ATTENTIVE, INVERSE
from aclip.method.masks.policy import Selection, kept_patches
from aclip.reports.kept_patches import PictureSet, kept_object_patches

USUAL_WARMUP = 0.25
"""What a warning proposes."""
LEAST_CAPTIONED = 64
"""With fewer samples, losses may not differ although the mask is good."""


@dataclass(frozen=True)
class MaskTeacher:
    """A teacher as a mask is measured with it; everything is on the CPU, and one rank may call
    alone.

    Attributes:
        scores: teacher views (n, 3, T, T) uint8 -> the attention on them (n, g, g) fp32.
        embed_kept: student views (n, V, 3, R, R) uint8 and what is kept of them -> (n, V, E) fp32,
            unnormalised.
        embed_texts: n captions -> (n, E) fp32, unnormalised.
    """

    scores: Callable[[Tensor], Tensor]
    embed_kept: Callable[[Tensor, Selection], Tensor]
    embed_texts: Callable[[list[str]], Tensor]


class MaskSignals:
    """Measures a mask that goes by the teacher's scores, on the same samples every time.

    Args:
        recipe: the run's recipe.
        pictured: the samples.
    """

    def __init__(self, recipe: Recipe, pictured: PictureSet):
        self._recipe = recipe
        self._pictured = pictured
        self._scores_before: Tensor | None = None

    def measure(
        self, teacher: MaskTeacher, scores: Tensor, progress: float
    ) -> tuple[dict[str, float], str]:
        """What can be told of the mask now.

        Args:
            teacher: the teacher of this moment.
            scores: (n, g, g) fp32, its attention on the samples' teacher views.
            progress: how much of the run is done, in [0, 1].

        Returns:
            Metrics: attention_kept, the share of the attention that lies on the patches that the
            mask keeps now; from the second time on agreement, the share of the patches kept by
            score that the scores of the time before would keep, of as many; and where samples have
            captions loss_kept and loss_dropped, the contrastive loss of their views when the
            patches of the most attention are shown, and as many of the least. A mask that keeps
            every patch now has neither of the two. And a warning, if the attention misses what
            captions speak of and the warm-up is over, else "".
        """
        pictured, mask = self._pictured, self._recipe.mask
        views = pictured.views(mask.policy, scores, progress)
        now = pictured.keep_ids(mask.policy, scores, progress)
        metrics = {"attention_kept": self._attention_on(now, scores)}
        if self._scores_before is not None:
            before = pictured.views(mask.policy, self._scores_before, progress)
            ids = (self._ids_of(self._recipe.mask_policy.select(each)) for each in (views, before))
            metrics["agreement"] = agreement(*ids, views.grid**2)
        self._scores_before = scores
        if now.shape[2] == views.grid**2:
            return metrics, ""
        best, worst = ATTENTIVE.select(views), INVERSE.select(views)
        kept = dropped = None
        if pictured.is_captioned.sum() > 1:
            kept, dropped = (self._losses(teacher, selection) for selection in (best, worst))
            metrics |= {"loss_kept": kept.mean().item(), "loss_dropped": dropped.mean().item()}
        if progress < mask.warmup:
            return metrics, ""
        if progress == 0:
            kept = None  # what knows no captions yet fits all patches equally
        return metrics, self._warning(self._ids_of(best), kept, dropped)

    def _warning(self, best_ids: Tensor, kept: Tensor | None, dropped: Tensor | None) -> str:
        """A sentence if the patches of the most attention hold less of the objects than others or,
        where no object is known, fit the captions no better than others; else "".

        Args:
            best_ids: (n, V, K) int64, the patches of the most attention.
            kept, dropped: (n,) losses of the captions, or None.
        """
        coverage, warmup = self._pictured.coverage, self._recipe.mask.warmup
        gains = object_gains(best_ids, coverage)
        has_losses = kept is not None and len(kept) >= LEAST_CAPTIONED
        if is_below_zero(gains):
            share = best_ids.shape[-1] / coverage.shape[-1] ** 2
            finding = (
                f"the patches of the most attention hold {100 * (share + gains.mean()):.1f} % of "
                f"the objects' patches, but {100 * share:.1f} % of all patches"
            )
        elif not len(gains) and has_losses and not is_below_zero(kept - dropped):
            finding = (
                f"captions fit the patches of the most attention (loss {kept.mean():.3f}) no "
                f"better than as many of the least ({dropped.mean():.3f})"
            )
        else:
            return ""
        advice = f"mask.warmup={USUAL_WARMUP} keeps blocks at random until it knows more"
        if warmup:
            advice = f"a longer mask.warmup than {warmup:g} gives it more time"
        return f"the teacher looks past what captions speak of: {finding}; in a new run, {advice}"

    def _ids_of(self, selection: Selection) -> Tensor:
        return kept_patches(selection, self._pictured.coverage.shape[-1])

    def _attention_on(self, keep_ids: Tensor, scores: Tensor) -> float:
        boxes = self._pictured.teacher_box, self._pictured.view_boxes
        grid = self._pictured.coverage.shape[-1]
        patches = block_scores(scores.unsqueeze(1), *boxes, grid, block_size=1).flatten(2)
        return (patches.gather(2, keep_ids).sum(2) / patches.sum(2)).mean().item()

    def _losses(self, teacher: MaskTeacher, selection: Selection) -> Tensor:
        pictured = self._pictured
        captions = [
            text
            for text, known in zip(pictured.captions, pictured.is_captioned, strict=True)
            if known
        ]
        images = teacher.embed_kept(pictured.student_views, selection)[pictured.is_captioned]
        scale = self._recipe.loss.initial_logit_scale  # the same in all of a run
        return caption_losses(images, teacher.embed_texts(captions), scale)


def agreement(keep_ids: Tensor, before: Tensor, num_patches: int) -> float:
    """The share of the kept patches, (n, V, K) int64, that are among those kept before, alike."""
    was_kept = torch.zeros(*before.shape[:2], num_patches).scatter(2, before, 1)
    return was_kept.gather(2, keep_ids).mean().item()


def caption_losses(images: Tensor, texts: Tensor, logit_scale: float) -> Tensor:
    """Each sample's part of the symmetric InfoNCE among these samples, mean over views: (n,).

    Args:
        images: (n, V, E) float, unnormalised.
        texts: (n, E) float, unnormalised.
        logit_scale: the factor itself.
    """
    images, texts = F.normalize(images, dim=-1), F.normalize(texts, dim=-1)
    logits = logit_scale * images.transpose(0, 1) @ texts.T  # (V, n, n)
    right = logits.diagonal(dim1=1, dim2=2)  # (V, n)
    return ((logits.logsumexp(2) + logits.logsumexp(1)) / 2 - right).mean(0)


def is_below_zero(differences: Tensor) -> bool:
    """Whether the mean of (n,) numbers is below 0 by more than two standard errors."""
    if len(differences) < 2:
        return False
    error = differences.std() / len(differences) ** 0.5
    return bool(differences.mean() + 2 * error < 0)


def object_gains(keep_ids: Tensor, coverage: Tensor) -> Tensor:
    """How much more of each sample's object is kept than of all its patches, mean over its views
    that show the object: a number for each sample with such a view."""
    kept, total = kept_object_patches(keep_ids, coverage)
    shares = (kept / total).nanmean(1)  # 0 / 0 where a view shows no object
    return shares[total.any(1)] - keep_ids.shape[-1] / coverage.shape[-1] ** 2
