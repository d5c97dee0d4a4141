"""attentive_pack as a torch op: checks, dispatch, shapes for torch.compile, autograd."""

import torch
from torch import Tensor

from aclip.kernels.attentive_pack.reference import (
    attentive_pack_backward_reference,
    attentive_pack_reference,
    grid_side,
    inverse_map,
)
from aclip.kernels.common import (
    FLOAT_DTYPES,
    MOVED_BYTES,
    check_device,
    check_dtype,
    check_shape,
    use_triton,
)


def attentive_pack(
    patches: Tensor,
    cls_token: Tensor,
    pos_embed: Tensor,
    scores: Tensor,
    teacher_box: Tensor | None,
    view_boxes: Tensor | None,
    num_kept_blocks: int,
    block_size: int,
) -> tuple[Tensor, Tensor]:
    """Keeps the best-scored blocks of patches of every view and packs them for the ViT.

    Arguments, dtypes and the exact meaning are those of `attentive_pack_reference`.

    Returns:
        packed (B*V, 1+K, C) in the dtype of patches, and keep_ids (B, V, K) int64 ascending.
        Gradients flow to patches, cls_token and pos_embed, none to scores.

    Raises:
        ValueError: a shape, dtype, device or count does not fit; on CPU also a box without area.
            On CUDA reading the boxes would stall the device: a length below 1 counts as 1 there.
    """
    check_shape("patches", patches, (None, None, None))
    grid = grid_side(patches.shape[1])
    _check(patches, cls_token, pos_embed, scores, teacher_box, view_boxes)
    if block_size < 1 or grid % block_size:
        raise ValueError(f"block_size is {block_size}; it must divide the {grid} patches a side.")
    if not 1 <= num_kept_blocks <= (grid // block_size) ** 2:
        raise ValueError(
            f"num_kept_blocks is {num_kept_blocks}; it must be 1 to {(grid // block_size) ** 2}, "
            f"the blocks of a {grid} x {grid} grid."
        )
    packed, keep_ids, _ = _attentive_pack(
        patches,
        cls_token,
        pos_embed,
        scores.detach(),
        teacher_box,
        view_boxes,
        num_kept_blocks,
        block_size,
    )
    return packed, keep_ids


def _check(
    patches: Tensor,
    cls_token: Tensor,
    pos_embed: Tensor,
    scores: Tensor,
    teacher_box: Tensor | None,
    view_boxes: Tensor | None,
) -> None:
    rows, num_patches, width = patches.shape
    check_shape("cls_token", cls_token, (width,))
    check_shape("pos_embed", pos_embed, (1 + num_patches, width))
    check_shape("scores", scores, (None, None, None, None))
    batch, sources = scores.shape[:2]
    if (teacher_box is None) != (view_boxes is None):
        missing = "teacher_box" if teacher_box is None else "view_boxes"
        raise ValueError(f"{missing} is None; give both boxes, or neither.")
    if teacher_box is not None and view_boxes is not None:
        check_shape("view_boxes", view_boxes, (batch, None, 4))
        check_shape("teacher_box", teacher_box, (batch, 4))
        check_shape("scores", scores, (batch, 1, scores.shape[3], None))
        views = view_boxes.shape[1]
        for name, box in (("teacher_box", teacher_box), ("view_boxes", view_boxes)):
            check_dtype(name, box, (torch.int32,))
            check_device(name, box, patches.device)
    else:
        views = sources
        grid = grid_side(num_patches)
        check_shape("scores", scores, (batch, views, grid, grid))
    if rows != batch * views:
        raise ValueError(f"patches has {rows} rows; {batch} samples of {views} views need another.")
    floats = {"patches": patches, "cls_token": cls_token, "pos_embed": pos_embed, "scores": scores}
    for name, tensor in floats.items():
        check_dtype(name, tensor, FLOAT_DTYPES)
        check_device(name, tensor, patches.device)


@torch.library.custom_op("aclip::attentive_pack", mutates_args=())
def _attentive_pack(
    patches: Tensor,
    cls_token: Tensor,
    pos_embed: Tensor,
    scores: Tensor,
    teacher_box: Tensor | None,
    view_boxes: Tensor | None,
    num_kept_blocks: int,
    block_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    if not patches.is_cuda:
        _check_areas("teacher_box", teacher_box)
        _check_areas("view_boxes", view_boxes)
    arguments = (
        patches,
        cls_token,
        pos_embed,
        scores,
        teacher_box,
        view_boxes,
        num_kept_blocks,
        block_size,
    )
    if use_triton(patches):
        # Triton is imported where it runs: a machine without a GPU need not have it.
        from aclip.kernels.attentive_pack.kernel import launch_attentive_pack

        return launch_attentive_pack(*arguments)
    packed, keep_ids = attentive_pack_reference(*arguments)
    return packed, keep_ids, inverse_map(keep_ids, patches.shape[1])


def _check_areas(name: str, boxes: Tensor | None) -> None:
    if boxes is not None and bool((boxes[..., 2:] < 1).any()):
        raise ValueError(f"{name} has a box of zero size; height and width must be 1 or more.")


@_attentive_pack.register_fake
def _(patches, cls_token, pos_embed, scores, teacher_box, view_boxes, num_kept_blocks, block_size):
    rows, num_patches, width = patches.shape
    batch = scores.shape[0]
    views = scores.shape[1] if view_boxes is None else view_boxes.shape[1]
    kept = num_kept_blocks * block_size**2
    return (
        patches.new_empty(rows, 1 + kept, width),
        patches.new_empty(batch, views, kept, dtype=torch.int64),
        patches.new_empty(batch, views, num_patches, dtype=torch.int32),
    )


def _moved_bytes(
    patches: Tensor,
    cls_token,
    pos_embed: Tensor,
    scores: Tensor,
    teacher_box,
    view_boxes,
    *kept: int,
) -> int:
    """Only rows that are kept are read."""
    num_blocks, block_size = kept
    num_kept = num_blocks * block_size**2
    packed = len(patches) * (1 + num_kept) * patches.shape[2] * patches.itemsize
    ids = len(patches) * (num_kept * 8 + patches.shape[1] * 4)
    return 2 * packed + pos_embed.nbytes + scores.nbytes + ids


MOVED_BYTES[torch.ops.aclip.attentive_pack] = _moved_bytes


@torch.library.custom_op("aclip::attentive_pack_backward", mutates_args=())
def _attentive_pack_backward(
    grad_packed: Tensor,
    inverse: Tensor,
    grad_patches: bool,
    grad_cls: bool,
    grad_pos: bool,
    pos_dtype: torch.dtype,
    cls_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    arguments = (grad_packed, inverse, grad_patches, grad_cls, grad_pos, pos_dtype, cls_dtype)
    if use_triton(grad_packed):
        from aclip.kernels.attentive_pack.kernel_backward import launch_attentive_pack_backward

        return launch_attentive_pack_backward(*arguments)
    return attentive_pack_backward_reference(*arguments)


@_attentive_pack_backward.register_fake
def _(grad_packed, inverse, grad_patches, grad_cls, grad_pos, pos_dtype, cls_dtype):
    rows, _, width = grad_packed.shape
    num_patches = inverse.shape[2]
    return (
        grad_packed.new_empty((rows, num_patches, width) if grad_patches else (0,)),
        grad_packed.new_empty((width,) if grad_cls else (0,), dtype=cls_dtype),
        grad_packed.new_empty((1 + num_patches, width) if grad_pos else (0,), dtype=pos_dtype),
    )


def _setup_context(ctx, inputs, output):
    _, cls_token, pos_embed = inputs[:3]
    _, keep_ids, inverse = output
    ctx.mark_non_differentiable(keep_ids, inverse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inverse)
    ctx.dtypes = pos_embed.dtype, cls_token.dtype


def _backward(ctx, grad_packed, *_):
    if grad_packed is None:
        return (None,) * 8
    (inverse,) = ctx.saved_tensors
    needed = list(ctx.needs_input_grad[:3])
    grads = _attentive_pack_backward(grad_packed, inverse, *needed, *ctx.dtypes)
    return *(grad if need else None for grad, need in zip(grads, needed, strict=True)), *(None,) * 5


_attentive_pack.register_autograd(_backward, setup_context=_setup_context)
