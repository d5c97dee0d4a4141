"""contrastive_loss in plain torch: the public meaning of the op, and its path on CPU."""

from collections.abc import Callable

import torch
from torch import Tensor


def contrastive_loss_reference(
    rows: Tensor,
    columns: Tensor,
    logit_scale: Tensor,
    labels_offset: int,
    chunk_size: int,
    grad_rows: bool,
    grad_columns: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean cross-entropy of rows against columns, and its gradients, one chunk of rows at a time.

    loss = mean over i of -log softmax(logit_scale * rows @ columns.T)[i, labels_offset + i].

    The gradients are computed with the loss: each chunk's logits become its softmax in place, so
    three matrix products do what recomputing the logits would need four for, and one
    chunk_size x N buffer is all the memory.

    Args:
        rows: (n, E) fp32, normalised local embeddings.
        columns: (N, E) fp32, normalised embeddings of the global batch.
        logit_scale: (1,) fp32, the factor itself, not its logarithm.
        labels_offset: column of row 0's positive.
        chunk_size: rows whose logits exist at once.
        grad_rows, grad_columns: whether these gradients are wanted; the scale's comes with the
            rows'.

    Returns:
        loss (), d_rows (n, E), d_columns (N, E), d_logit_scale (1,), all fp32, the last three for a
        loss gradient of 1; those not asked for have no elements.
    """
    return by_chunks(
        rows,
        columns,
        logit_scale,
        labels_offset,
        chunk_size,
        grad_rows,
        grad_columns,
        _softmax_gradient_,
    )


def by_chunks(
    rows: Tensor,
    columns: Tensor,
    logit_scale: Tensor,
    labels_offset: int,
    chunk_size: int,
    grad_rows: bool,
    grad_columns: bool,
    softmax_gradient_: Callable[[Tensor, Tensor, Tensor, int, int], None],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loop over chunks, for both backends; arguments and result as above.

    softmax_gradient_(dots, loss, logit_scale, first_label, num_rows) writes each row's
    cross-entropy into `loss` and turns `dots` into (softmax - one-hot) / num_rows, in place.
    """
    num_rows = rows.shape[0]
    losses = rows.new_empty(num_rows)
    d_rows = torch.empty_like(rows) if grad_rows else rows.new_empty(0)
    d_columns = torch.zeros_like(columns) if grad_columns else rows.new_empty(0)
    buffer = rows.new_empty(min(chunk_size, num_rows), columns.shape[0])
    for start in range(0, num_rows, chunk_size):
        chunk = rows[start : start + chunk_size]
        logits = torch.mm(chunk, columns.t(), out=buffer[: chunk.shape[0]])
        loss = losses[start : start + chunk_size]
        softmax_gradient_(logits, loss, logit_scale, labels_offset + start, num_rows)
        if grad_rows:
            torch.mm(logits, columns, out=d_rows[start : start + chunk_size])
        if grad_columns:
            d_columns.addmm_(logits.t(), chunk)
    d_scale = (d_rows * rows).sum().view(1) if grad_rows else rows.new_empty(0)
    if grad_rows:
        d_rows.mul_(logit_scale)
    if grad_columns:
        d_columns.mul_(logit_scale)
    return losses.mean(), d_rows, d_columns, d_scale


def _softmax_gradient_(
    dots: Tensor, loss: Tensor, logit_scale: Tensor, first_label: int, num_rows: int
) -> None:
    logits = dots.mul_(logit_scale)
    diagonal = logits.diagonal(first_label)[: loss.shape[0]]
    positives = diagonal.clone()
    highest = logits.amax(1, keepdim=True)
    weights = logits.sub_(highest).exp_()
    total = weights.sum(1, keepdim=True)
    # The difference first: it is exact where both are large, as at a high logit scale.
    loss.copy_(total.log().squeeze(1) + (highest.squeeze(1) - positives))
    weights.div_(total * num_rows)
    diagonal.sub_(1 / num_rows)
