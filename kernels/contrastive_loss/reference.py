"""contrastive_loss in plain torch: the public meaning of the op, and its path on CPU."""

from torch import Tensor

from aclip.kernels.chunked_logits import loss_and_gradients


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

    The loop is that of `loss_and_gradients`, which says what is in memory.

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
    num_rows = rows.shape[0]

    def gradient_(dots: Tensor, loss: Tensor, first: int) -> None:
        _softmax_gradient_(dots, loss, logit_scale, labels_offset + first, num_rows)

    return loss_and_gradients(
        rows, columns, logit_scale, chunk_size, grad_rows, grad_columns, gradient_
    )


def _softmax_gradient_(
    dots: Tensor, loss: Tensor, logit_scale: Tensor, first_label: int, num_rows: int
) -> None:
    """Writes each row's cross-entropy into `loss`, turns dots into (softmax - one-hot) / n."""
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
