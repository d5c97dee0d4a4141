"""The blocks that the EMA teacher attends to are kept; or, for comparison, the others.

Source: A-CLIP, arXiv:2212.08653, section 3.2.
"""

from aclip.method.masks.policy import MaskPolicy, Selection, ViewsToMask


def select_attentive(views: ViewsToMask) -> Selection:
    """Keeps the blocks to which the teacher's CLS token attends most."""
    return views.by_teacher(views.teacher_scores)


def select_inverse(views: ViewsToMask) -> Selection:
    """Keeps the blocks to which the teacher's CLS token attends least."""
    return views.by_teacher(views.teacher_scores, lowest=True)


ATTENTIVE = MaskPolicy("attentive", select_attentive, reads_teacher=True)
INVERSE = MaskPolicy(
    "inverse",
    select_inverse,
    "This run keeps the patches of the least attention (inverse).",
    reads_teacher=True,
)
