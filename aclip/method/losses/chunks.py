"""Losses of rows whose logits exist chunk by chunk, in plain torch."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def by_chunks(function: Callable[..., Tensor], size: int, *rows: Tensor) -> Tensor:
    """function(*rows), for `size` rows at a time; what it computes in between is computed again in
    the backward pass.

    Args:
        function: gives a number for each row, which depends on that row alone, and draws nothing.
        size: rows of a chunk.
        rows: tensors with the same number of rows.

    Returns:
        (rows,), in order.
    """
    chunks = zip(*(each.split(size) for each in rows), strict=True)
    return torch.cat(
        [
            checkpoint(function, *chunk, use_reentrant=False, preserve_rng_state=False)
            for chunk in chunks
        ]
    )


def soft_cross_entropy(logits: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Cross-entropy of logits with a target that has a few places.

    Args:
        logits: (rows, columns) fp32, finite.
        ids: (rows, places) int64, the columns of each row's target.
        weights: (rows, places) fp32, what each of them is of the target; 0 for none.

    Returns:
        (rows,) fp32, the sum over the places of weight * -log softmax(logits).
    """
    return logits.logsumexp(1) * weights.sum(1) - (logits.gather(1, ids) * weights).sum(1)
