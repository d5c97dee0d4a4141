"""Parameters' names that other formats know too, and what no shape tells of a model."""

from dataclasses import dataclass

from aclip.models.student import Student

LOGIT_SCALE = "logit_scale.log_logit_scale"
LOGIT_BIAS = "logit_bias.logit_bias"
"""Of a model that was trained with a loss that learns one."""
TEXT_SIDE = ("text.", "text_projection.")
"""How the names of all that a caption passes through begin."""


@dataclass(frozen=True)
class TowerFacts:
    """What shapes don't tell of a model; None where it is not known."""

    image_heads: int | None = None
    text_heads: int | None = None


def tower_facts(student: Student) -> TowerFacts:
    """The numbers of heads, which no shape tells."""
    return TowerFacts(student.image.num_heads, student.text.num_heads)
