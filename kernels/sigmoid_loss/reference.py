"""sigmoid_loss in plain torch: the public meaning of the op, and its path on CPU."""

import torch.nn.functional as F
from torch import Tensor

from aclip.kernels.chunked_logits import loss_and_gradients


def sigmoid_loss_reference(
    rows: Tensor,
    columns: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    labels_offset: int,
    chunk_size: int,
    grad_rows: bool,
    grad_columns: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sum over the columns of -log sigmoid(z * logit), mean over the rows, and its gradients.

    logit = logit_scale * rows @ columns.T + logit_bias; z is 1 for row i and column
    labels_offset + i, and -1 elsewhere. The loop is that of `loss_and_gradients`, which says what
    is in memory; softplus takes a second chunk for a moment.

    Args:
        rows: (n, E) fp32, normalised local embeddings.
        columns: (N, E) fp32, normalised embeddings of the global batch.
        logit_scale, logit_bias: (1,) fp32.
        labels_offset: column of row 0's positive.
        chunk_size: rows whose logits exist at once.
        grad_rows, grad_columns: whether these gradients are wanted; those of scale and bias come
            with the rows'.

    Returns:
        loss (), d_rows (n, E), d_columns (N, E), d_logit_scale (1,), d_logit_bias (1,), all fp32,
        the last four for a loss gradient of 1; those not asked for have no elements.

    Source: SigLIP, arXiv:2303.15343, algorithm 1.
    """
    num_rows = rows.shape[0]
    row_sums = rows.new_empty(num_rows)

    def gradient_(dots: Tensor, loss: Tensor, first: int) -> None:
        # With the positives' sign turned, every logit's loss is softplus and its slope sigmoid.
        logits = dots.mul_(logit_scale).add_(logit_bias)
        positives = logits.diagonal(labels_offset + first)[: len(loss)]
        positives.neg_()
        loss.copy_(F.softplus(logits).sum(1))
        logits.sigmoid_().div_(num_rows)
        positives.neg_()
        row_sums[first : first + len(loss)] = logits.sum(1)

    loss, *gradients = loss_and_gradients(
        rows, columns, logit_scale, chunk_size, grad_rows, grad_columns, gradient_
    )
    d_bias = row_sums.sum().view(1) if grad_rows else rows.new_empty(0)
    return loss, *gradients, d_bias
