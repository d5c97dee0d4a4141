"""The terms of the loss, in the order in which their modules and their noise are drawn.

That order is part of what a seed means: add new terms at the end.
"""

from aclip.method.losses.byol import Byol
from aclip.method.losses.contrastive import Contrastive
from aclip.method.losses.distill import Distill
from aclip.method.losses.mlm import Mlm
from aclip.method.losses.sigmoid import Sigmoid
from aclip.method.losses.simclr import Simclr
from aclip.method.losses.term import LossTerm
from aclip.method.losses.words import Words

TERMS: tuple[type[LossTerm], ...] = (Contrastive, Simclr, Byol, Distill, Mlm, Sigmoid, Words)


def no_auxiliary_terms() -> dict[str, float]:
    """Weights of the recipe's section `loss` that leave only what aligns images and captions."""
    return {term.name: 0.0 for term in TERMS if not term.aligns}
