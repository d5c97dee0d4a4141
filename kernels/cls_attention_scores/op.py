"""cls_attention_scores as a torch op: checks, dispatch, and its fake for torch.compile."""

import math

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from aclip.kernels.cls_attention_scores.reference import cls_attention_scores_reference
from aclip.kernels.common import (
    FLOAT_DTYPES,
    check_device,
    check_dtype,
    check_shape,
    use_triton,
)


def cls_attention_scores(q: Tensor, k: Tensor, scores: Tensor, weight: float) -> None:
    """Adds one layer's CLS attention to a running sum, in place; no gradient.

    Arguments, dtypes and the exact meaning are those of `cls_attention_scores_reference`.

    Raises:
        ValueError: a shape, dtype or device does not fit, or scores is not contiguous.
    """
    check_shape("q", q, (None, None, None))
    batch, heads, dim = q.shape
    check_shape("k", k, (batch, None, heads, dim))
    check_shape("scores", scores, (batch, k.shape[1] - 1))
    check_dtype("q", q, FLOAT_DTYPES)
    check_dtype("k", k, (q.dtype,))
    check_dtype("scores", scores, (torch.float32,))
    check_device("k", k, q.device)
    check_device("scores", scores, q.device)
    if not scores.is_contiguous():
        raise ValueError("scores is not contiguous; give a buffer of its own.")
    _cls_attention_scores(q.detach(), k.detach(), scores, float(weight))


@torch.library.custom_op("aclip::cls_attention_scores", mutates_args=("scores",))
def _cls_attention_scores(q: Tensor, k: Tensor, scores: Tensor, weight: float) -> None:
    if use_triton(q):
        # Triton is imported where it runs: a machine without a GPU need not have it.
        from aclip.kernels.cls_attention_scores.kernel import launch_cls_attention

        launch_cls_attention(q, k, scores, weight)
    else:
        cls_attention_scores_reference(q, k, scores, weight)


@_cls_attention_scores.register_fake
def _(q, k, scores, weight):
    return None


@register_flop_formula(torch.ops.aclip.cls_attention_scores)
def _flops(q, k, scores, weight, out_shape=None) -> int:
    return 2 * math.prod(k)
