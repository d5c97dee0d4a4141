"""Parameters' names that other formats know too, and what no shape tells of a model."""

from dataclasses import dataclass

from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer

from aclip.models.student import Student

LOGIT_SCALE = "logit_scale.log_logit_scale"
LOGIT_BIAS = "logit_bias.logit_bias"
"""Of a model that was trained with a loss that learns one."""
TEXT_SIDE = ("text.", "text_projection.")
"""How the names of all that a caption passes through begin."""


@dataclass(frozen=True)
class TowerFacts:
    """What shapes don't tell of a model; None where it is not known.

    Attributes:
        image_heads, text_heads: the numbers of heads.
        image_activation: the class of the image tower's activation, such as GELU or QuickGELU.
    """

    image_heads: int | None = None
    text_heads: int | None = None
    image_activation: str | None = None


def tower_facts(student: Student) -> TowerFacts:
    """What no shape tells of a student's towers."""
    image = vit_facts(student.image.vit)
    return TowerFacts(image.image_heads, student.text.num_heads, image.image_activation)


def vit_facts(vit: VisionTransformer | Eva) -> TowerFacts:
    """What no shape tells of an image tower of timm's.

    Raises:
        AttributeError: it is another kind of network.
    """
    block = vit.blocks[0]
    return TowerFacts(block.attn.num_heads, None, type(block.mlp.act).__name__)
