"""The loop over chunks of rows that losses over the global batch share: n x N logits never exist at
once."""

from collections.abc import Callable

import torch
from torch import Tensor

from aclip.kernels.common import check_device, check_dtype, check_shape


def loss_and_gradients(
    rows: Tensor,
    columns: Tensor,
    logit_scale: Tensor,
    chunk_size: int,
    grad_rows: bool,
    grad_columns: bool,
    gradient_: Callable[[Tensor, Tensor, int], None],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The mean over the rows of a loss of each row's logits, logit_scale * row @ columns.T + ...,
    and its gradients.

    The gradients are computed with the loss: each chunk's products become the gradient of its
    logits in place, so three matrix products do what recomputing the logits would need four for,
    and one chunk_size x N buffer is all the memory.

    Args:
        rows: (n, E) fp32.
        columns: (N, E) fp32.
        logit_scale: (1,) fp32.
        chunk_size: rows whose logits exist at once.
        grad_rows, grad_columns: whether these gradients are wanted; the scale's comes with the
            rows'.
        gradient_: gradient_(dots, loss, first) gets the products (c, N) of the rows from `first`
            on; it writes each row's loss into `loss` (c,) and turns `dots` into the gradient of
            the mean loss by the logits, in place.

    Returns:
        loss (), d_rows (n, E), d_columns (N, E), d_logit_scale (1,), all fp32, the last three for a
        loss gradient of 1; those not asked for have no elements.
    """
    num_rows = rows.shape[0]
    losses = rows.new_empty(num_rows)
    d_rows = torch.empty_like(rows) if grad_rows else rows.new_empty(0)
    d_columns = torch.zeros_like(columns) if grad_columns else rows.new_empty(0)
    buffer = rows.new_empty(min(chunk_size, num_rows), columns.shape[0])
    for first in range(0, num_rows, chunk_size):
        chunk = rows[first : first + chunk_size]
        dots = torch.mm(chunk, columns.t(), out=buffer[: chunk.shape[0]])
        gradient_(dots, losses[first : first + chunk_size], first)
        if grad_rows:
            torch.mm(dots, columns, out=d_rows[first : first + chunk_size])
        if grad_columns:
            d_columns.addmm_(dots.t(), chunk)
    d_scale = (d_rows * rows).sum().view(1) if grad_rows else rows.new_empty(0)
    if grad_rows:
        d_rows.mul_(logit_scale)
    if grad_columns:
        d_columns.mul_(logit_scale)
    return losses.mean(), d_rows, d_columns, d_scale


def check_arguments(
    rows: Tensor,
    columns: Tensor,
    numbers: dict[str, Tensor],
    labels_offset: int,
    chunk_size: int,
) -> None:
    """Refuses what `loss_and_gradients` can't compute.

    Args:
        numbers: the learned numbers of the logits by the op's names, each (1,).

    Raises:
        ValueError: a shape, dtype or device does not fit, or the labels leave the columns.
    """
    check_shape("rows", rows, (None, None))
    num_rows, width = rows.shape
    check_shape("columns", columns, (None, width))
    for name, number in numbers.items():
        check_shape(name, number, (1,))
    for name, tensor in {"rows": rows, "columns": columns, **numbers}.items():
        check_dtype(name, tensor, (torch.float32,))
        check_device(name, tensor, rows.device)
    if num_rows == 0:
        raise ValueError("rows has no rows; the mean needs one or more.")
    if not 0 <= labels_offset <= columns.shape[0] - num_rows:
        raise ValueError(
            f"labels_offset is {labels_offset}; with {num_rows} rows and {columns.shape[0]} "
            f"columns it must be 0 to {columns.shape[0] - num_rows}."
        )
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; it must be 1 or more.")


def keep_gradients(ctx, inputs, output):
    """setup_context of an op that gives a loss, and the gradients of its first inputs."""
    _, *grads = output
    ctx.mark_non_differentiable(*grads)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*grads)


def scale_gradients(ctx, grad_loss, *_):
    """Backward of such an op: each kept gradient times that of the loss."""
    needed = ctx.needs_input_grad
    if grad_loss is None:
        return (None,) * len(needed)
    kept = ctx.saved_tensors
    grads = zip(kept, needed, strict=False)
    without = (None,) * (len(needed) - len(kept))
    return *(grad_loss * grad if need else None for grad, need in grads), *without


def count_flops(rows: torch.Size, columns: torch.Size, grad_rows: bool, grad_columns: bool) -> int:
    """FLOPs of `loss_and_gradients`' matrix products, two for a multiply-add, from the shapes of
    its arguments."""
    return 2 * rows.numel() * columns[0] * (1 + grad_rows + grad_columns)


def work_space(rows: Tensor, columns: Tensor, chunk_size: int) -> int:
    """Bytes that `loss_and_gradients` holds only while it runs."""
    return min(chunk_size, len(rows)) * len(columns) * rows.itemsize


def moved_bytes(
    rows: Tensor, columns: Tensor, num_transfers: int, grad_rows: bool, grad_columns: bool
) -> int:
    """Bytes that `loss_and_gradients` reads and writes: each product its operands and result, and
    `num_transfers` of the loss's own kernel over the logits."""
    logits = len(rows) * len(columns) * rows.itemsize
    num_products = 1 + grad_rows + grad_columns
    return num_products * (logits + rows.nbytes + columns.nbytes) + num_transfers * logits
