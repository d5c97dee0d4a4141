"""From a micro-batch to what the student reads: colours, kept patches, targets of masked modelling.

Everything random was drawn by the data workers, so that the same batch gives the same input, in a
second pass and on any number of ranks too.
"""

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from aclip.config.recipe import Recipe
from aclip.data.augment import augment
from aclip.data.batch import Batch
from aclip.data.device_views import cut_views_on_device
from aclip.distributed import world_size
from aclip.method import masking
from aclip.models.student import DistillInput, MlmInput, StudentInput
from aclip.tokens import real_token_ids
from aclip.training.teacher import Teacher


@dataclass(frozen=True)
class Taught:
    """What the teacher makes of a micro-batch; parts that the recipe leaves out are None.

    Attributes:
        scores: (B, g, g) fp32 of the teacher view. features: (B, C) of the teacher view.
        patches: (B, P, C), features of the first student view's patches.
    """

    scores: Tensor | None = None
    features: Tensor | None = None
    patches: Tensor | None = None


class StepInputs:
    """Makes the student's inputs of a recipe.

    Args:
        recipe: decides which parts are made.
        teacher: None where the recipe has none.
        grid: patches per side of a student view. num_kept_blocks: of a masked student view.
        patch_size: pixels per side of a patch.
        device, dtype: of the towers.
    """

    def __init__(
        self,
        recipe: Recipe,
        teacher: Teacher | None,
        grid: int,
        num_kept_blocks: int,
        patch_size: int,
        device: torch.device,
        dtype: torch.dtype,
    ):
        self._recipe = recipe
        self._teacher = teacher
        self._grid = grid
        self._num_kept_blocks = num_kept_blocks
        self._patch_size = patch_size
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
            self._to_device(micro.teacher_box),
            recipe.model.image.resolution,
            recipe.teacher.resolution if recipe.needs_teacher_view else None,
        )
        return replace(micro, whole_images=None, **views)

    def teach(self, micro: Batch) -> Taught:
        """Runs the teacher on the views that the recipe's parts ask for."""
        scores = features = patches = None
        if self._recipe.needs_teacher_view:
            output = self._teacher.forward(self._augment(micro.teacher_view, None))
            scores, features = output.scores, output.features
        if self._recipe.distills_features:
            view, params = micro.student_views[:, 0], micro.augment_params[:, 0]
            patches = self._teacher.encode_patches(self._augment(view, params))
        return Taught(scores, features, patches)

    def centre(self, taught: list[Taught]) -> Tensor | None:
        """Mean direction of the global batch's patch features, (C,) fp32, for codewords."""
        if not self._recipe.distills_features or self._recipe.distill.targets != "codewords":
            return None
        means = [F.normalize(t.patches.float(), dim=-1).mean((0, 1)) for t in taught]
        centre = torch.stack(means).mean(0)
        if world_size() > 1:
            dist.all_reduce(centre)
            centre /= world_size()
        return centre

    def student(self, micro: Batch, taught: Taught, centre: Tensor | None) -> StudentInput:
        """The student's input of a micro-batch."""
        views = micro.student_views
        pixels = self._augment(views.flatten(0, 1), micro.augment_params.flatten(0, 1))
        pixels = pixels.unflatten(0, views.shape[:2])
        return StudentInput(
            pixels,
            self.select(micro, taught.scores),
            self._to_device(micro.tokens),
            # Counted while the tokens are on the CPU: on a GPU, the step would wait for the count.
            self._to_device(real_token_ids(micro.tokens)),
            self._ssl_pixels(micro),
            self._distill(micro, pixels[:, 0], taught, centre),
            self._mlm(micro),
        )

    def select(self, micro: Batch, scores: Tensor | None) -> masking.Selection | None:
        """The kept patches of the student views."""
        return masking.select(
            self._recipe.mask.policy,
            self._num_kept_blocks,
            self._recipe.mask.block_size,
            teacher_scores=scores,
            teacher_box=self._to_device(micro.teacher_box),
            view_boxes=self._to_device(micro.student_boxes),
            noise=self._to_device(micro.mask_noise),
        )

    def _ssl_pixels(self, micro: Batch) -> Tensor | None:
        if micro.ssl_views is None:
            return None
        pixels = self._augment(micro.ssl_views.flatten(0, 1), micro.ssl_params.flatten(0, 1))
        return pixels.unflatten(0, micro.ssl_views.shape[:2])

    def _distill(
        self, micro: Batch, pixels: Tensor, taught: Taught, centre: Tensor | None
    ) -> DistillInput | None:
        if micro.distill_noise is None:
            return None
        config = self._recipe.distill
        num_patches = self._grid**2
        num_kept = num_patches - int(config.mask_ratio * num_patches)
        noise = self._to_device(micro.distill_noise)
        selection = masking.select("random", num_kept, 1, noise=noise)
        keep_ids = masking.kept_patches(selection, self._grid, len(micro), 1)[:, 0]
        masked_ids = masking.other_patches(keep_ids, num_patches)
        if config.targets == "pixels":
            targets = normalised_patches(pixels, self._patch_size)
        else:
            targets = taught.patches
        targets = targets.gather(1, masked_ids.unsqueeze(-1).expand(-1, -1, targets.shape[-1]))
        if config.targets == "codewords":
            targets = self._teacher.codeword_probabilities(
                targets, centre, config.teacher_temperature
            )
        elif config.targets == "features":
            targets = F.layer_norm(targets.float(), targets.shape[-1:])
        return DistillInput(selection, masked_ids, targets)

    def _mlm(self, micro: Batch) -> MlmInput | None:
        if micro.mlm_noise is None:
            return None
        masked = masking.mask_tokens(micro.tokens, micro.mlm_noise, self._recipe.mlm.mask_ratio)
        # On the CPU, where the tokens still are: the number of masked tokens needs no host sync.
        ids = masked.flatten().nonzero().squeeze(1)
        rows = ids // masked.shape[1]
        parts = (
            masked,
            ids,
            micro.tokens.flatten()[ids],
            rows,
            1.0 / masked.sum(1)[rows],
        )
        return MlmInput(*(self._to_device(part) for part in parts))

    def _augment(self, views: Tensor, params: Tensor | None) -> Tensor:
        views, params = self._to_device(views), self._to_device(params)
        return augment(views, params, self._recipe.augment, self._dtype)

    def _to_device(self, tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        copies = self._device.type == "cuda" and tensor.is_cpu
        if copies and not (tensor.is_pinned() and tensor.is_contiguous()):
            # A copy from pageable or scattered memory would wait for the device.
            tensor = tensor.contiguous().pin_memory()
        return tensor.to(self._device, non_blocking=True)


def normalised_patches(pixels: Tensor, patch_size: int) -> Tensor:
    """Each patch's pixels with mean 0 and variance 1, MAE's targets.

    Args:
        pixels: (B, 3, R, R). patch_size: p.

    Returns:
        (B, P, 3 * p * p) fp32.
    """
    patches = pixels.float().unfold(2, patch_size, patch_size).unfold(3, patch_size, patch_size)
    patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    return F.layer_norm(patches, patches.shape[-1:], eps=1e-6)
