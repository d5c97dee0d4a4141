"""Triton kernel of contrastive_loss: the softmax of a chunk of logits, its loss and gradient.

i row of the chunk, n column of N. The matrix products stay with cuBLAS.
"""

import triton
import triton.language as tl
from torch import Tensor

from aclip.kernels.chunked_logits import loss_and_gradients
from aclip.kernels.common import INTERPRET, on_device_of

NUM_WARPS = 8
LOWEST = tl.constexpr(-1e30)


@triton.jit
def softmax_gradient_kernel(
    dots_ptr,  # (rows, N) fp32, becomes (softmax - one-hot) / num_rows
    loss_ptr,  # (rows,) fp32
    scale_ptr,  # (1,) fp32
    N,
    first_label,
    inverse_num_rows,
    BLOCK_N: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    row = dots_ptr + i * N
    label = first_label + i
    scale = tl.load(scale_ptr)
    # Before the reductions, whose barriers keep it from the gradient that overwrites it below.
    positive = tl.load(row + label) * scale
    # Running maximum and sum per lane, merged once at the end: no reduction inside the loop.
    # The start is finite, since -inf - -inf would be NaN in lanes past the last column.
    highest = tl.full([BLOCK_N], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        logits = tl.where(n < N, tl.load(row + n, mask=n < N, other=0.0) * scale, 2 * LOWEST)
        higher = tl.maximum(highest, logits)
        total = total * tl.exp(highest - higher) + tl.exp(logits - higher)
        highest = higher
    top = tl.max(highest, axis=0)
    total = tl.sum(total * tl.exp(highest - top), axis=0)
    tl.store(loss_ptr + i, tl.log(total) + (top - positive))
    share = inverse_num_rows / total
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        logits = tl.load(row + n, mask=n < N, other=0.0) * scale
        gradient = tl.exp(logits - top) * share
        gradient = tl.where(n == label, gradient - inverse_num_rows, gradient)
        tl.store(row + n, gradient, mask=n < N)


def block_size(num_columns: int) -> int:
    """BLOCK_N of `softmax_gradient_kernel`."""
    return min(triton.next_power_of_2(num_columns), 16384 if INTERPRET else 2048)


def launch_softmax_gradient_(
    dots: Tensor, loss: Tensor, logit_scale: Tensor, first_label: int, num_rows: int
) -> None:
    """Turns dots into (softmax - one-hot) / num_rows and fills loss, one program per row."""
    with on_device_of(dots):
        softmax_gradient_kernel[(dots.shape[0],)](
            dots,
            loss,
            logit_scale,
            dots.shape[1],
            first_label,
            1.0 / num_rows,
            BLOCK_N=block_size(dots.shape[1]),
            num_warps=NUM_WARPS,
        )


def launch_contrastive_loss(
    rows: Tensor,
    columns: Tensor,
    logit_scale: Tensor,
    labels_offset: int,
    chunk_size: int,
    grad_rows: bool,
    grad_columns: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss, d_rows, d_columns and d_logit_scale, as `contrastive_loss_reference` returns them."""
    num_rows = rows.shape[0]

    def gradient_(dots: Tensor, loss: Tensor, first: int) -> None:
        launch_softmax_gradient_(dots, loss, logit_scale, labels_offset + first, num_rows)

    return loss_and_gradients(
        rows, columns, logit_scale, chunk_size, grad_rows, grad_columns, gradient_
    )
