"""cls_attention_scores in plain torch: the public meaning of the op, and its path on CPU."""

from torch import Tensor


def cls_attention_scores_reference(q: Tensor, k: Tensor, scores: Tensor, weight: float) -> None:
    """Adds one layer's CLS attention to a running sum, in place.

    scores += weight * mean over heads of softmax over N (q . k * d**-0.5), column 0 (CLS) left out.

    Args:
        q: (B, H, d) float, the CLS query after any q_norm.
        k: (B, N, H, d) float, keys of all tokens, row 0 the CLS key; a strided view is fine.
        scores: (B, N-1) fp32, changed in place. No gradient flows.
        weight: 1 / number of layers gives the mean over layers.
    """
    # Products and sums in fp32 instead of a matmul: keys in 16 bits stay exact, no TF32 on CUDA.
    logits = (k.float() * q.float().unsqueeze(1)).sum(-1) * q.shape[-1] ** -0.5  # (B, N, H)
    scores.add_(logits.softmax(1).mean(2)[:, 1:], alpha=weight)
