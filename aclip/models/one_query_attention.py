"""Attention of a single query per sample, which needs no keys and values of their own."""

import torch
from torch import Tensor


def one_query_attention(
    query: Tensor,
    x: Tensor,
    k_weight: Tensor,
    v_weight: Tensor,
    v_bias: Tensor | None,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attends from one query to the rows of x, equal to attention over the keys and values of x.

    With one query both products move to its side: q . (Wk x + bk) is (Wk^T q) . x plus a constant
    that softmax does not see, and the mean of Wv x + bv is Wv (mean of x) + bv. For B samples of N
    rows this replaces 2 B N C^2 products by 2 B C^2 + 2 B H N C. The key's bias drops out: its
    gradient is zero.

    Args:
        query: (B, H, d) float, with its bias.
        x: (B, N, C) float, what keys and values would be computed from; padding must be finite.
        k_weight, v_weight: (H * d, C), the weights of the key's and the value's linear.
        v_bias: (H * d,), the bias of the value's linear, or None.
        keep: (B, N) bool, the rows attended to, one or more in each sample; None for all.

    Returns:
        The heads' outputs side by side (B, H * d) in the dtype of x, and the attention (B, H, N)
        fp32.
    """
    heads, dim = query.shape[1:]
    lifted = torch.bmm(query.transpose(0, 1), k_weight.unflatten(0, (heads, dim)))  # (H, B, C)
    # Logits in fp32, as fused attention has them: in bf16 one of 8 would be off by 0.03.
    rows = x.float()
    logits = torch.bmm(lifted.transpose(0, 1).float() * dim**-0.5, rows.transpose(1, 2))
    if keep is not None:
        logits = logits.masked_fill(~keep.unsqueeze(1), float("-inf"))
    attention = logits.softmax(-1)  # (B, H, N)
    pooled = torch.bmm(attention, rows).to(x.dtype)  # (B, H, C)
    v_heads = v_weight.unflatten(0, (heads, dim))
    out = torch.bmm(pooled.transpose(0, 1), v_heads.transpose(1, 2))  # (H, B, d)
    out = out.transpose(0, 1).flatten(1)
    return out if v_bias is None else out + v_bias, attention
