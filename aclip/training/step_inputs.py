"""From a micro-batch to what the student reads: colours, kept patches, targets of masked modelling.

Everything random was drawn by the data workers, so that the same batch gives the same input, also
in a second pass and on any number of ranks.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from aclip.config.geometry import kept_blocks, patch_grid
from aclip.config.recipe import Recipe
from aclip.data.batch import Batch
from aclip.data.images.augment import augment
from aclip.data.images.device_views import cut_views_on_device
from aclip.engine.sharded_state import gathered
from aclip.method.losses.term import LossTerm, Taught, TermContext
from aclip.method.masks.noise import noise_share
from aclip.method.masks.policy import Selection, ViewsToMask, select_patches
from aclip.method.score_codes import decode_scores, encode_scores
from aclip.models.student import StudentInput
from aclip.models.vit import ImageTower
from aclip.training.teacher import Teacher


class StepInputs:
    """Makes the student's inputs of a recipe.

    Args:
        recipe: decides which parts are made.
        terms: the loss terms that have a weight.
        teacher: None where the recipe has none.
        image: the student's image tower, for its grid of patches and their embeddings.
        device: where the towers are.
        dtype: the towers' compute dtype.
    """

    def __init__(
        self,
        recipe: Recipe,
        terms: tuple[LossTerm, ...],
        teacher: Teacher | None,
        image: ImageTower,
        device: torch.device,
        dtype: torch.dtype,
    ):
        # The workers draw noise for the grid that they read out of the recipe.
        assert image.grid == patch_grid(recipe), (image.grid, patch_grid(recipe))
        self._recipe = recipe
        self._terms = terms
        self._teacher = teacher
        self._image = image
        self._device = device
        self._dtype = dtype

    def with_views(self, micro: Batch) -> Batch:
        """The micro-batch with its views; cuts them on the device where it holds whole images."""
        if micro.whole_images is None:
            return micro
        recipe = self._recipe
        views = cut_views_on_device(
            micro.whole_images.to(self._device),
            self._to_device(micro.student_boxes),
            self._to_device(micro.teacher_box) if any(micro.to_teach) else None,
            recipe.model.image.resolution,
            recipe.teacher.resolution if recipe.needs_teacher_view else None,
        )
        return replace(micro, whole_images=None, **views)

    def teach(self, micro: Batch) -> Taught:
        """Runs the teacher on the views that the recipe's parts ask for; on its own view only of
        the samples that it scores."""
        scores = features = patches = codes = None
        rows = [row for row, reason in enumerate(micro.to_teach) if reason]
        if rows:
            is_whole = len(rows) == len(micro.to_teach)
            view = micro.teacher_view if is_whole else self._rows_of(micro.teacher_view, rows)
            output = self._teacher.forward(
                self._augment(view, None),
                self._recipe.teacher.score_layers,
                self._recipe.needs_teacher_features,
            )
            scores, features = output.scores, output.features
        if self._recipe.keeps_scores:
            scores, codes = self._as_kept(scores, rows, micro.stored_scores)
        if self._recipe.needs_teacher_patches:
            view, params = micro.student_views[:, 0], micro.augment_params[:, 0]
            patches = self._teacher.encode_patches(self._augment(view, params))
        return Taught(scores, features, patches, codes)

    def _as_kept(
        self, scores: Tensor | None, rows: list[int], stored: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """The scores to mask by, and the codes of all samples once there are new ones.

        New scores go through their codes too, so that a sample's mask is the same in the step in
        which it is scored as in one that reads what was kept.

        Args:
            scores: new ones, of the samples `rows`.
            stored: codes that were kept, of all samples; zeros for those without.
        """
        fresh = None if scores is None else encode_scores(scores)
        codes = fresh if stored is None else self._to_device(stored)
        if stored is not None and fresh is not None:
            codes = codes.index_copy(0, self._to_device(torch.tensor(rows)), fresh)
        if codes is None:
            return None, None
        return decode_scores(codes), None if fresh is None else codes

    def statistics(
        self, micro_batches: list[Batch], taught: list[Taught]
    ) -> dict[str, Tensor | None]:
        """Each term's statistic of the global batch, by the term's name; every rank must call, once
        a step.

        Args:
            micro_batches: this rank's part of the global batch.
            taught: what the teacher made of each of them.
        """
        tokens = [micro.tokens for micro in micro_batches]
        return {term.name: term.statistic(taught, tokens, self._to_device) for term in self._terms}

    def num_captions(self, batch: Batch) -> Tensor | None:
        """Tokens.num_captions of this rank's part of the global batch, on the device."""
        return self._to_device(batch.tokens.num_captions)

    def student(
        self,
        micro: Batch,
        taught: Taught,
        statistics: dict[str, Tensor | None],
        progress: float = 1.0,
    ) -> StudentInput:
        """The student's input of a micro-batch.

        Args:
            micro: the micro-batch, with its views.
            taught: what the teacher made of it.
            statistics: what `statistics` gave of the step.
            progress: how much of the run is done, in [0, 1].
        """
        views = micro.student_views
        pixels = self._augment(views.flatten(0, 1), micro.augment_params.flatten(0, 1))
        pixels = pixels.unflatten(0, views.shape[:2])
        return StudentInput(
            pixels=pixels,
            selection=self.select(micro, pixels, taught.scores, progress),
            tokens=micro.tokens.map(self._to_device),
            ssl_pixels=self._ssl_pixels(micro),
            of_terms=self._of_terms(micro, pixels, taught, statistics),
        )

    def select(
        self, micro: Batch, pixels: Tensor, scores: Tensor | None, progress: float
    ) -> Selection | None:
        """The kept patches of the student views; None for all."""
        mask, policy = self._recipe.mask, self._recipe.mask_policy
        share = noise_share(progress, mask.warmup, mask.warmup_change)
        reads_noise = policy.reads_noise or share > 0 or mask.temperature > 0
        views = ViewsToMask(
            self._image.grid,
            kept_blocks(mask, self._image.grid, progress),
            mask.block_size,
            pixels=pixels,
            noise=self._to_device(micro.mask_noise) if reads_noise else None,
            teacher_scores=scores,
            teacher_box=self._to_device(micro.teacher_box),
            view_boxes=self._to_device(micro.student_boxes),
            progress=progress,
            noise_share=share,
            temperature=mask.temperature,
            keys=mask,
            embeddings=self._embeddings(pixels) if mask.cluster_embeddings else None,
        )
        return select_patches(policy, views)

    @torch.no_grad()
    def _embeddings(self, pixels: Tensor) -> Tensor:
        """The student's patch embeddings, without positions: (B, V, 3, R, R) -> (B, V, P, C)."""
        with gathered(list(self._image.vit.patch_embed.parameters())):
            return self._image.embed_patches(pixels.flatten(0, 1)).unflatten(0, pixels.shape[:2])

    def _of_terms(
        self,
        micro: Batch,
        pixels: Tensor,
        taught: Taught,
        statistics: dict[str, Tensor | None],
    ) -> dict[str, Any]:
        context = TermContext(
            pixels=pixels,
            tokens=micro.tokens,
            noise=None,
            taught=taught,
            statistic=None,
            teacher=None if self._teacher is None else self._teacher.model,
            grid=self._image.grid,
            patch_size=self._image.patch_size,
            to_device=self._to_device,
        )
        return {
            term.name: term.inputs(
                replace(
                    context,
                    noise=micro.term_noise.get(term.name),
                    statistic=statistics.get(term.name),
                )
            )
            for term in self._terms
        }

    def _ssl_pixels(self, micro: Batch) -> Tensor | None:
        if micro.ssl_views is None:
            return None
        pixels = self._augment(micro.ssl_views.flatten(0, 1), micro.ssl_params.flatten(0, 1))
        return pixels.unflatten(0, micro.ssl_views.shape[:2])

    def _augment(self, views: Tensor, params: Tensor | None) -> Tensor:
        views, params = self._to_device(views), self._to_device(params)
        return augment(views, params, self._recipe.augment, self._dtype)

    def _rows_of(self, tensor: Tensor, rows: list[int]) -> Tensor:
        """Some rows of a tensor. An index that is a list would be copied to a GPU in a way that
        waits for it."""
        index = torch.tensor(rows)
        return tensor.index_select(0, index if tensor.is_cpu else self._to_device(index))

    def _to_device(self, tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        copies = self._device.type == "cuda" and tensor.is_cpu
        if copies and not (tensor.is_pinned() and tensor.is_contiguous()):
            # A copy from pageable or scattered memory would wait for the device.
            tensor = tensor.contiguous().pin_memory()
        return tensor.to(self._device, non_blocking=True)
