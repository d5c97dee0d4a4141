"""Masked self-distillation of the image (MaskCLIP): hidden patches from the visible ones.

The decoder exists only during training, so that the tower need not keep what only reconstruction
asks for. K patches are kept and M masked of a view's P = K + M.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from aclip.distributed import world_size
from aclip.method.losses.term import (
    SampleTerm,
    Taught,
    TermContext,
    TermPart,
    transformer_blocks,
    trunc_normal,
)
from aclip.method.masks.policy import Selection, kept_patches, other_patches
from aclip.section import Section, Weight


class Keys(Section):
    distill: Weight = 0.0
    """Weight of masked self-distillation; see DistillConfig."""


class DistillConfig(Section):
    """Masked self-distillation of the image (MaskCLIP): a second pass of the first student view
    with most patches masked, which a decoder predicts. Read when loss.distill has a weight."""

    mask_ratio: float = Field(0.75, gt=0, lt=1)
    """Share of the patches that is masked, rounded down."""
    decoder_layers: int = Field(1, ge=1)
    targets: Literal["codewords", "features", "pixels"] = "codewords"
    """What is predicted: the teacher's features as soft codewords, the features themselves, or the
    patch's normalised pixels, which needs no teacher."""
    num_codewords: int = Field(4096, ge=2)
    student_temperature: float = Field(0.1, gt=0)
    teacher_temperature: float = Field(0.04, gt=0)


@dataclass(frozen=True)
class DistillInput:
    """What is hidden of the first student view.

    Attributes:
        selection: keeps the visible patches.
        masked_ids: (B, M) int64, the other patches.
        targets: (B, M, D), what the decoder's head should give; no gradient.
    """

    selection: Selection
    masked_ids: Tensor
    targets: Tensor


class Distill(SampleTerm):
    name, keys, section = "distill", Keys, DistillConfig
    trains = ("image",)

    def __init__(self, recipe):
        super().__init__(recipe)
        self.config: DistillConfig = recipe.distill
        self.reads_teacher_patches = self.config.targets != "pixels"

    def parts(self, student: nn.Module) -> dict[str, TermPart]:
        width, patch = student.image.width, student.image.patch_size
        parts = {}
        if self.config.targets == "codewords":
            parts["codewords"] = TermPart(
                Codewords(width, self.config.num_codewords), averaged=True
            )
        head = nn.Linear(width, 3 * patch**2 if self.config.targets == "pixels" else width)
        layers = self.config.decoder_layers
        parts["distill_decoder"] = TermPart(
            PatchDecoder(width, student.image.grid**2, layers, head)
        )
        return parts

    def noise_shape(self, grid: int) -> tuple[int, ...]:
        return 1, grid, grid

    def statistic(self, taught: list[Taught], *_) -> Tensor | None:
        """Mean direction of the global batch's patch features, (C,) fp32, for codewords."""
        if self.config.targets != "codewords":
            return None
        means = [F.normalize(part.patches.float(), dim=-1).mean((0, 1)) for part in taught]
        centre = torch.stack(means).mean(0)
        if world_size() > 1:
            dist.all_reduce(centre)
            centre /= world_size()
        return centre

    def inputs(self, context: TermContext) -> DistillInput:
        num_patches = context.grid**2
        num_kept = num_patches - int(self.config.mask_ratio * num_patches)
        noise = context.to_device(context.noise)
        selection = Selection(noise, None, None, num_kept, block_size=1)
        keep_ids = kept_patches(selection, context.grid)[:, 0]
        masked_ids = other_patches(keep_ids, num_patches)
        if self.config.targets == "pixels":
            targets = normalised_patches(context.pixels[:, 0], context.patch_size)
        else:
            targets = context.taught.patches
        targets = targets.gather(1, masked_ids.unsqueeze(-1).expand(-1, -1, targets.shape[-1]))
        if self.config.targets == "codewords":
            targets = codeword_probabilities(
                context.teacher.codewords,
                targets,
                context.statistic,
                self.config.teacher_temperature,
            )
        elif self.config.targets == "features":
            targets = F.layer_norm(targets.float(), targets.shape[-1:])
        return DistillInput(selection, masked_ids, targets)

    def encode(self, student: nn.Module, inputs, features: dict[str, Tensor]) -> Tensor:
        """(B,) fp32, the term of each sample."""
        own: DistillInput = inputs.of_terms[self.name]
        rows, keep_ids = student.image.forward_patches(inputs.pixels[:, 0], own.selection)
        predictions = student.distill_decoder(rows, keep_ids, own.masked_ids)
        if self.config.targets != "codewords":
            return reconstruct(predictions, own.targets)
        similarities = student.codewords(predictions)
        return distill(similarities, own.targets, self.config.student_temperature)


class PatchDecoder(nn.Module):
    """Predicts each masked patch from the kept patches' features.

    Args:
        width: C, the image tower's width.
        num_patches: P, the patches of a view.
        num_layers: number of transformer blocks.
        head: turns (B, M, C) into the prediction.

    Source: MAE, arXiv:2111.06377; as a part of CLIP training MaskCLIP, arXiv:2208.12262.
    """

    def __init__(self, width: int, num_patches: int, num_layers: int, head: nn.Module):
        super().__init__()
        self.mask_token = trunc_normal(width)
        self.positions = trunc_normal(1 + num_patches, width)
        self.blocks = transformer_blocks(width, num_layers)
        self.norm = nn.LayerNorm(width)
        self.head = head

    def forward(self, rows: Tensor, keep_ids: Tensor, masked_ids: Tensor) -> Tensor:
        """Predicts the masked patches.

        Args:
            rows: (B, S + K, C), the image tower's normalised prefix rows (CLS token, registers)
                and kept patches.
            keep_ids: (B, K) int64, the patch of each kept row.
            masked_ids: (B, M) int64, the patches to predict.

        Returns:
            (B, M, D), what the head makes of each masked patch.
        """
        # Attention knows no order: the mask tokens follow the kept ones, each with its position.
        num_prefix = rows.shape[1] - keep_ids.shape[1]
        visible = rows + self.positions[F.pad(keep_ids + 1, (num_prefix, 0))]
        masked = self.mask_token + self.positions[masked_ids + 1]
        x = self.blocks(torch.cat([visible, masked], dim=1))
        return self.head(self.norm(x[:, rows.shape[1] :]))


class Codewords(nn.Module):
    """Gives features' cosine similarities with learned codewords: the online quantiser."""

    def __init__(self, width: int, num_codewords: int):
        super().__init__()
        self.weight = trunc_normal(num_codewords, width)

    def forward(self, features: Tensor) -> Tensor:
        """(..., C) -> (..., num_codewords) in [-1, 1]."""
        return self.similarities(F.normalize(features, dim=-1))

    def similarities(self, unit_features: Tensor) -> Tensor:
        """The same for features of length one, or for differences of such."""
        return F.linear(unit_features, F.normalize(self.weight, dim=-1))


def codeword_probabilities(
    codewords: Codewords, features: Tensor, centre: Tensor, temperature: float
) -> Tensor:
    """Soft codewords of patch features; without the centre one codeword would take all.

    Args:
        features: (..., C).
        centre: (C,) fp32, mean of the global batch's normalised features.
        temperature: divides the similarities.

    Returns:
        (..., codewords) fp32, each row sums to one.

    Source: centring and sharpening as in DINO, arXiv:2104.14294.
    """
    centred = F.normalize(features.float(), dim=-1) - centre
    similarities = codewords.similarities(centred.to(features.dtype))
    return (similarities.float() / temperature).softmax(-1)


def normalised_patches(pixels: Tensor, patch_size: int) -> Tensor:
    """Pixels of each patch, normalised by the patch's mean and variance: MAE's targets.

    Args:
        pixels: (B, 3, R, R).
        patch_size: p.

    Returns:
        (B, P, 3 * p * p) fp32.
    """
    patches = pixels.float().unfold(2, patch_size, patch_size).unfold(3, patch_size, patch_size)
    patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    return F.layer_norm(patches, patches.shape[-1:], eps=1e-6)


def distill(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of the predicted codewords of the masked patches against the teacher's.

    Args:
        logits: (B, M, N) float, similarities to N codewords.
        targets: (B, M, N) float, probabilities; no gradient.
        temperature: divides the logits.

    Returns:
        (B,) fp32, mean over the masked patches of each sample.

    Source: MaskCLIP, arXiv:2208.12262.
    """
    log_probabilities = F.log_softmax(logits.float() / temperature, dim=-1)
    return -(targets.detach().float() * log_probabilities).sum(-1).mean(1)


def reconstruct(predictions: Tensor, targets: Tensor) -> Tensor:
    """Mean square error at the masked patches, for targets `features` and `pixels`.

    Args:
        predictions, targets: (B, M, D) float; no gradient into the targets.

    Returns:
        (B,) fp32, mean over the masked patches of each sample and over D.

    Source: MAE, arXiv:2111.06377.
    """
    return (predictions.float() - targets.detach().float()).square().mean((1, 2))
