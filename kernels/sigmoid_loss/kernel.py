"""Triton kernel of sigmoid_loss: losses and gradients of a chunk of logits, in one pass.

i row of the chunk, n column of N. The matrix products stay with cuBLAS.
"""

import triton
import triton.language as tl
from torch import Tensor

from aclip.kernels.chunked_logits import loss_and_gradients
from aclip.kernels.common import INTERPRET, on_device_of

NUM_WARPS = 8


@triton.jit
def sigmoid_gradient_kernel(
    dots_ptr,  # (rows, N) fp32, becomes the gradient of the mean loss by the logits
    loss_ptr,  # (rows,) fp32
    sum_ptr,  # (rows,) fp32, the gradient's sum over the columns
    scale_ptr,  # (1,) fp32
    bias_ptr,  # (1,) fp32
    N,
    first_label,
    inverse_num_rows,
    BLOCK_N: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    row = dots_ptr + i * N
    label = first_label + i
    scale = tl.load(scale_ptr)
    bias = tl.load(bias_ptr)
    # Sums per lane, added up once at the end: no reduction inside the loop.
    total = tl.zeros([BLOCK_N], tl.float32)
    slopes = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        logits = tl.load(row + n, mask=n < N, other=0.0) * scale + bias
        # With the positive's sign turned, every logit's loss is softplus and its slope sigmoid.
        logits = tl.where(n == label, -logits, logits)
        small = tl.exp(-tl.abs(logits))
        # log(1 + small) to the last digit, where 1 + small rounds: most negatives lie there.
        rounded = 1.0 + small
        exact = rounded - 1.0
        log = tl.where(
            exact == 0.0, small, tl.log(rounded) * (small / tl.where(exact == 0.0, 1.0, exact))
        )
        total += tl.where(n < N, tl.maximum(logits, 0.0) + log, 0.0)
        slope = tl.where(logits < 0, small, 1.0) / rounded * inverse_num_rows
        slope = tl.where(n == label, -slope, slope)
        slopes += tl.where(n < N, slope, 0.0)
        tl.store(row + n, slope, mask=n < N)
    tl.store(loss_ptr + i, tl.sum(total, axis=0))
    tl.store(sum_ptr + i, tl.sum(slopes, axis=0))


def block_size(num_columns: int) -> int:
    """BLOCK_N of `sigmoid_gradient_kernel`."""
    return min(triton.next_power_of_2(num_columns), 16384 if INTERPRET else 2048)


def launch_sigmoid_loss(
    rows: Tensor,
    columns: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    labels_offset: int,
    chunk_size: int,
    grad_rows: bool,
    grad_columns: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss, d_rows, d_columns, d_logit_scale and d_logit_bias, as `sigmoid_loss_reference`."""
    num_rows, num_columns = rows.shape[0], columns.shape[0]
    row_sums = rows.new_empty(num_rows)

    def gradient_(dots: Tensor, loss: Tensor, first: int) -> None:
        with on_device_of(dots):
            sigmoid_gradient_kernel[(dots.shape[0],)](
                dots,
                loss,
                row_sums[first:],
                logit_scale,
                logit_bias,
                num_columns,
                labels_offset + first,
                1.0 / num_rows,
                BLOCK_N=block_size(num_columns),
                num_warps=NUM_WARPS,
            )

    loss, *gradients = loss_and_gradients(
        rows, columns, logit_scale, chunk_size, grad_rows, grad_columns, gradient_
    )
    d_bias = row_sums.sum().view(1) if grad_rows else rows.new_empty(0)
    return loss, *gradients, d_bias
