"""contrastive_loss as a torch op: checks, dispatch, shapes for torch.compile, autograd."""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from aclip.kernels import chunked_logits
from aclip.kernels.common import MOVED_BYTES, WORK_SPACE, use_triton
from aclip.kernels.contrastive_loss.reference import contrastive_loss_reference


def contrastive_loss(
    rows: Tensor, columns: Tensor, logit_scale: Tensor, labels_offset: int, chunk_size: int
) -> Tensor:
    """Mean cross-entropy of rows against columns; row i's positive is column labels_offset + i.

    Equal to F.cross_entropy(logit_scale * rows @ columns.T, arange + labels_offset) up to fp32
    rounding, with the logits of `chunk_size` rows in memory at a time.

    Args:
        rows: (n, E) fp32, n >= 1, normalised local embeddings.
        columns: (N, E) fp32, normalised embeddings of the global batch.
        logit_scale: (1,) fp32, the factor itself, not its logarithm.
        labels_offset: rank * n where every rank has n rows.
        chunk_size: rows whose logits exist at once.

    Returns:
        () fp32. Gradients flow to rows, columns and logit_scale. They are computed with the loss
        wherever one of the three needs one, and kept until the backward pass: n + N rows of E.

    Raises:
        ValueError: a shape, dtype or device does not fit, or the labels leave the columns.
    """
    numbers = {"logit_scale": logit_scale}
    chunked_logits.check_arguments(rows, columns, numbers, labels_offset, chunk_size)
    grad = torch.is_grad_enabled()
    return _contrastive_loss(
        rows,
        columns,
        logit_scale,
        labels_offset,
        chunk_size,
        grad and (rows.requires_grad or logit_scale.requires_grad),
        grad and columns.requires_grad,
    )[0]


@torch.library.custom_op("aclip::contrastive_loss", mutates_args=())
def _contrastive_loss(
    rows: Tensor,
    columns: Tensor,
    logit_scale: Tensor,
    labels_offset: int,
    chunk_size: int,
    grad_rows: bool,
    grad_columns: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    arguments = (
        rows.contiguous(),
        columns.contiguous(),
        logit_scale,
        labels_offset,
        chunk_size,
        grad_rows,
        grad_columns,
    )
    if use_triton(rows):
        # Triton is imported where it runs: a machine without a GPU need not have it.
        from aclip.kernels.contrastive_loss.kernel import launch_contrastive_loss

        return launch_contrastive_loss(*arguments)
    return contrastive_loss_reference(*arguments)


@_contrastive_loss.register_fake
def _(rows, columns, logit_scale, labels_offset, chunk_size, grad_rows, grad_columns):
    return (
        rows.new_empty(()),
        rows.new_empty(rows.shape if grad_rows else (0,)),
        rows.new_empty(columns.shape if grad_columns else (0,)),
        rows.new_empty((1,) if grad_rows else (0,)),
    )


_contrastive_loss.register_autograd(
    chunked_logits.scale_gradients, setup_context=chunked_logits.keep_gradients
)


@register_flop_formula(torch.ops.aclip.contrastive_loss)
def _flops(rows, columns, scale, offset, chunk, grad_rows, grad_columns, out_shape=None) -> int:
    return chunked_logits.count_flops(rows, columns, grad_rows, grad_columns)


WORK_SPACE[torch.ops.aclip.contrastive_loss] = lambda rows, columns, scale, offset, chunk, *_: (
    chunked_logits.work_space(rows, columns, chunk)
)

MOVED_BYTES[torch.ops.aclip.contrastive_loss] = lambda rows, columns, *others: (
    chunked_logits.moved_bytes(rows, columns, 3, *others[-2:])
)
