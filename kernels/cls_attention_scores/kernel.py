"""Triton kernel of cls_attention_scores.

b sample, n token (0 is CLS), h head, d channel of a head; stride_xy is x's stride along y.
"""

import triton
import triton.language as tl
from torch import Tensor

from aclip.kernels.common import INTERPRET, on_device_of

NUM_WARPS = 8


@triton.jit
def cls_attention_kernel(
    q_ptr,  # (B, H, D)
    k_ptr,  # (B, N, H, D), D contiguous
    scores_ptr,  # (B, N-1) fp32, contiguous
    stride_qb,
    stride_qh,
    stride_kb,
    stride_kn,
    stride_kh,
    N,
    H,
    D,
    scale,  # D**-0.5
    weight,  # this layer's weight, divided by H
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_N], tl.float32)
    for h in range(H):
        q_row = q_ptr + b * stride_qb + h * stride_qh
        k_rows = k_ptr + b * stride_kb + n[:, None] * stride_kn + h * stride_kh
        logits = tl.zeros([BLOCK_N], tl.float32)
        # Narrow slices of D keep a tile of all tokens within the registers.
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            q = tl.load(q_row + d, mask=d < D, other=0.0).to(tl.float32)
            inside = (n[:, None] < N) & (d[None, :] < D)
            k = tl.load(k_rows + d[None, :], mask=inside, other=0.0).to(tl.float32)
            logits += tl.sum(k * q[None, :], axis=1)
        logits = tl.where(n < N, logits * scale, -float("inf"))
        attention = tl.exp(logits - tl.max(logits, axis=0))
        total += attention / tl.sum(attention, axis=0)
    out = scores_ptr + b * (N - 1) + n - 1
    patch = (n > 0) & (n < N)
    tl.store(out, tl.load(out, mask=patch, other=0.0) + total * weight, mask=patch)


def block_sizes(num_tokens: int, head_dim: int) -> dict[str, int]:
    """Tile of `cls_attention_kernel`: all tokens by so many channels that it has 8192 elements."""
    block_n = triton.next_power_of_2(num_tokens)
    widest = 128 if INTERPRET else 32
    block_d = max(1, min(triton.next_power_of_2(head_dim), widest, 8192 // block_n))
    return {"BLOCK_N": block_n, "BLOCK_D": block_d}


def launch_cls_attention(q: Tensor, k: Tensor, scores: Tensor, weight: float) -> None:
    """One program per sample; reads each key once, needs no atomics."""
    batch, heads, dim = q.shape
    if batch == 0:
        return
    num_tokens = k.shape[1]
    q = q if q.stride(2) == 1 else q.contiguous()
    k = k if k.stride(3) == 1 else k.contiguous()
    with on_device_of(q):
        cls_attention_kernel[(batch,)](
            q,
            k,
            scores,
            *q.stride()[:2],
            *k.stride()[:3],
            num_tokens,
            heads,
            dim,
            dim**-0.5,
            weight / heads,
            **block_sizes(num_tokens, dim),
            num_warps=NUM_WARPS,
        )
