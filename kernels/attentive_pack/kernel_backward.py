"""Triton kernel of attentive_pack's gradients: patches, CLS token and positions in one launch.

m row of patches (sample b, view v), p patch of P, j kept patch of K, c channel of C.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from aclip.kernels.common import INTERPRET, on_device_of

NUM_WARPS = 4


@triton.jit
def attentive_pack_backward_kernel(
    grad_ptr,  # (M, 1+K, C)
    inverse_ptr,  # (M, P) int32
    d_patches_ptr,  # (M, P, C)
    d_cls_ptr,  # (C,)
    d_pos_ptr,  # (1+P, C)
    M,
    P,
    K,
    C,
    GRAD_PATCHES: tl.constexpr,
    GRAD_CLS: tl.constexpr,
    GRAD_POS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program per row of pos_embed and slice of C sums over all m in order: no atomics.

    It reads each gradient row once, through the inverse map, and writes d_patches on the way, zeros
    included.
    """
    row = tl.program_id(0).to(tl.int64)  # 0 is CLS, 1 + p a patch
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c[None, :] < C
    total = tl.zeros([BLOCK_C], tl.float32)
    for start in range(0, M, ROWS):
        m = start + tl.arange(0, ROWS).to(tl.int64)
        at_patch = (m < M) & (row > 0)
        j = tl.load(inverse_ptr + m * P + row - 1, mask=at_patch, other=-1)
        kept = (m < M) & ((row == 0) | (j >= 0))
        source = grad_ptr + (m * (1 + K) + 1 + j)[:, None] * C + c[None, :]
        grad = tl.load(source, mask=kept[:, None] & in_c, other=0.0)
        total += tl.sum(grad.to(tl.float32), axis=0)
        if GRAD_PATCHES:
            target = d_patches_ptr + (m * P + row - 1)[:, None] * C + c[None, :]
            tl.store(target, grad, mask=at_patch[:, None] & in_c)
    if GRAD_POS:
        value = total.to(d_pos_ptr.dtype.element_ty)
        tl.store(d_pos_ptr + row * C + c, value, mask=c < C)
    if GRAD_CLS:
        value = total.to(d_cls_ptr.dtype.element_ty)
        tl.store(d_cls_ptr + c, value, mask=(c < C) & (row == 0))


def backward_blocks(width: int) -> dict[str, int]:
    """Block sizes of `attentive_pack_backward_kernel` for C."""
    return {
        "ROWS": 8 if INTERPRET else 32,
        "BLOCK_C": min(triton.next_power_of_2(width), 1024 if INTERPRET else 256),
    }


def launch_attentive_pack_backward(
    grad_packed: Tensor,
    inverse: Tensor,
    grad_patches: bool,
    grad_cls: bool,
    grad_pos: bool,
    pos_dtype: torch.dtype,
    cls_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """d_patches, d_cls and d_pos; those not asked for have no elements."""
    rows, length, width = grad_packed.shape
    num_patches = inverse.shape[2]
    grad_packed = grad_packed.contiguous()
    d_patches = grad_packed.new_empty((rows, num_patches, width) if grad_patches else (0,))
    d_cls = grad_packed.new_empty((width,) if grad_cls else (0,), dtype=cls_dtype)
    d_pos = grad_packed.new_empty((1 + num_patches, width) if grad_pos else (0,), dtype=pos_dtype)
    blocks = backward_blocks(width)
    table_rows = 1 + num_patches if grad_patches or grad_pos else 1
    with on_device_of(grad_packed):
        attentive_pack_backward_kernel[(table_rows, triton.cdiv(width, blocks["BLOCK_C"]))](
            grad_packed,
            inverse,
            d_patches,
            d_cls,
            d_pos,
            rows,
            num_patches,
            length - 1,
            width,
            GRAD_PATCHES=grad_patches,
            GRAD_CLS=grad_cls,
            GRAD_POS=grad_pos,
            **blocks,
            num_warps=NUM_WARPS,
        )
    return d_patches, d_cls, d_pos
