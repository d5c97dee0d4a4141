"""sigmoid_loss as a torch op: checks, dispatch, shapes for torch.compile, autograd, its cost."""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from aclip.kernels import chunked_logits
from aclip.kernels.common import MOVED_BYTES, WORK_SPACE, use_triton
from aclip.kernels.sigmoid_loss.reference import sigmoid_loss_reference


def sigmoid_loss(
    rows: Tensor,
    columns: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    labels_offset: int,
    chunk_size: int,
) -> Tensor:
    """Sum over the columns of -log sigmoid(z * logit), mean over the rows.

    logit = logit_scale * rows @ columns.T + logit_bias; z is 1 for row i and column
    labels_offset + i, and -1 elsewhere. Logits of `chunk_size` rows are in memory at a time.

    Args:
        rows: (n, E) fp32, n >= 1, normalised local embeddings.
        columns: (N, E) fp32, normalised embeddings of the global batch.
        logit_scale: (1,) fp32, the factor itself, not its logarithm.
        logit_bias: (1,) fp32.
        labels_offset: rank * n where every rank has n rows.
        chunk_size: rows whose logits exist at once.

    Returns:
        () fp32. Gradients flow to rows, columns, logit_scale and logit_bias. They are computed with
        the loss wherever one of the four needs one, and kept until the backward pass: n + N rows
        of E.

    Raises:
        ValueError: a shape, dtype or device does not fit, or the labels leave the columns.
    """
    numbers = {"logit_scale": logit_scale, "logit_bias": logit_bias}
    chunked_logits.check_arguments(rows, columns, numbers, labels_offset, chunk_size)
    grad = torch.is_grad_enabled()
    of_rows = rows.requires_grad or logit_scale.requires_grad or logit_bias.requires_grad
    return _sigmoid_loss(
        rows,
        columns,
        logit_scale,
        logit_bias,
        labels_offset,
        chunk_size,
        grad and of_rows,
        grad and columns.requires_grad,
    )[0]


@torch.library.custom_op("aclip::sigmoid_loss", mutates_args=())
def _sigmoid_loss(
    rows: Tensor,
    columns: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    labels_offset: int,
    chunk_size: int,
    grad_rows: bool,
    grad_columns: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    compute = sigmoid_loss_reference
    if use_triton(rows):
        # Triton is imported where it runs: a machine without a GPU need not have it.
        from aclip.kernels.sigmoid_loss.kernel import launch_sigmoid_loss as compute
    return compute(
        rows.contiguous(),
        columns.contiguous(),
        logit_scale,
        logit_bias,
        labels_offset,
        chunk_size,
        grad_rows,
        grad_columns,
    )


@_sigmoid_loss.register_fake
def _(rows, columns, logit_scale, logit_bias, labels_offset, chunk_size, grad_rows, grad_columns):
    return (
        rows.new_empty(()),
        rows.new_empty(rows.shape if grad_rows else (0,)),
        rows.new_empty(columns.shape if grad_columns else (0,)),
        rows.new_empty((1,) if grad_rows else (0,)),
        rows.new_empty((1,) if grad_rows else (0,)),
    )


_sigmoid_loss.register_autograd(
    chunked_logits.scale_gradients, setup_context=chunked_logits.keep_gradients
)


@register_flop_formula(torch.ops.aclip.sigmoid_loss)
def _flops(rows, columns, scale, bias, offset, chunk, grad_rows, grad_columns, out_shape=None):
    return chunked_logits.count_flops(rows, columns, grad_rows, grad_columns)


# Twice, since the reference's softplus takes a second chunk; the kernel needs one.
WORK_SPACE[torch.ops.aclip.sigmoid_loss] = lambda rows, columns, scale, bias, offset, chunk, *_: (
    2 * chunked_logits.work_space(rows, columns, chunk)
)

MOVED_BYTES[torch.ops.aclip.sigmoid_loss] = lambda rows, columns, *others: (
    chunked_logits.moved_bytes(rows, columns, 2, *others[-2:])
)
