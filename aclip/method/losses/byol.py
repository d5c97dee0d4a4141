"""BYOL between the student's views and the teacher's."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aclip.method.losses.heads import mlp_head
from aclip.method.losses.term import LossTerm, StudentOutput, Taught, TermPart, by_view
from aclip.section import Section, Weight, Width


class Keys(Section):
    byol: Weight = 2.0
    """Weight of BYOL between the student's views and the teacher's."""
    byol_widths: tuple[Width, Width] = (4096, 256)
    """Hidden and output width of BYOL's projector and predictor."""


class Byol(LossTerm):
    name, keys, trains = "byol", Keys, ("image",)
    reads_teacher_features = True

    def __init__(self, recipe):
        super().__init__(recipe)
        self.widths = recipe.loss.byol_widths

    def parts(self, student: nn.Module) -> dict[str, TermPart]:
        projector = mlp_head([student.image.width, *self.widths])
        predictor = mlp_head([self.widths[-1], *self.widths])
        return {
            "byol_projector": TermPart(projector, averaged=True),
            "byol_predictor": TermPart(predictor),
        }

    def project(self, student: nn.Module, features: dict[str, Tensor]) -> Tensor:
        """(B, V, D), the predictions."""
        return by_view(student.byol_predictor, by_view(student.byol_projector, features["image"]))

    def target(self, teacher: nn.Module, taught: list[Taught]) -> Tensor:
        """(B, D); the head's BatchNorm spans the whole local batch."""
        return teacher.byol_projector(torch.cat([part.features for part in taught]))

    def loss(self, output: StudentOutput, target: Tensor) -> Tensor:
        return byol(output.heads[self.name], target)


def byol(predictions: Tensor, targets: Tensor) -> Tensor:
    """2 - 2 cos between the student's predictions and the teacher's projection, mean over the
    views.

    Args:
        predictions: (B, V, D) float, the predictor's output for each student view.
        targets: (B, D) float, the teacher's projection of its own view; no gradient.

    Returns:
        Scalar fp32 in [0, 4].

    Source: BYOL, arXiv:2006.07733; "online to teacher" in A-CLIP, arXiv:2212.08653.
    """
    predictions = F.normalize(predictions.float(), dim=-1)
    targets = F.normalize(targets.detach().float(), dim=-1).unsqueeze(1)
    return (2 - 2 * (predictions * targets).sum(-1)).mean()
