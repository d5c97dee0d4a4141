"""The model's own parameters by name, and what no shape tells of it."""

from dataclasses import dataclass

import torch

from aclip.models.student import Student

LOGIT_SCALE = "logit_scale.log_logit_scale"
EXPORTED = ("image.", "text.", "image_projection.", "text_projection.", LOGIT_SCALE)
"""How the names of a model begin without what exists only during training."""


@dataclass(frozen=True)
class TowerFacts:
    """What shapes don't tell of a model; None where it is not known."""

    image_heads: int | None = None
    text_heads: int | None = None


def tower_facts(student: Student) -> TowerFacts:
    """The numbers of heads, which no shape tells."""
    vit, text = student.image.vit, student.text.transformer
    return TowerFacts(vit.blocks[0].attn.num_heads, text.config.num_attention_heads)


def exported_parameters(student: Student) -> dict[str, torch.nn.Parameter]:
    """The parameters of the model itself: towers, projections and logit scale."""
    return {name: p for name, p in student.named_parameters() if name.startswith(EXPORTED)}
