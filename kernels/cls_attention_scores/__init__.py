"""The CLS query's attention to every patch, summed over layers without the N x N matrix."""

from aclip.kernels.cls_attention_scores.op import cls_attention_scores
from aclip.kernels.cls_attention_scores.reference import cls_attention_scores_reference

__all__ = ["cls_attention_scores", "cls_attention_scores_reference"]
