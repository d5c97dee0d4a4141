"""cut_views as a torch op: checks, dispatch, and its fake for torch.compile."""

import torch
from torch import Tensor

from aclip.kernels.common import check_device, check_dtype, check_shape, use_triton
from aclip.kernels.cut_views.reference import PLACES, cut_views_reference


def cut_views(
    pixels: Tensor, places: Tensor, boxes: Tensor, flips: Tensor | None, side: int
) -> Tensor:
    """Cuts boxes out of whole images, resamples them to squares and mirrors some of them.

    Arguments and the exact meaning are those of `cut_views_reference`. No gradient. On CUDA the
    values of places and boxes are not checked, since reading them would wait for the device; a box
    that reaches out of its image reads nothing there.

    Raises:
        ValueError: a shape, dtype or device does not fit, or the views would have no pixel.
    """
    check_shape("pixels", pixels, (None, 3))
    check_dtype("pixels", pixels, (torch.uint8,))
    check_shape("places", places, (None, len(PLACES)))
    check_dtype("places", places, (torch.int64,))
    check_device("places", places, pixels.device)
    check_shape("boxes", boxes, (places.shape[0], None, 4))
    check_dtype("boxes", boxes, (torch.int32, torch.int64))
    check_device("boxes", boxes, pixels.device)
    if flips is not None:
        check_shape("flips", flips, boxes.shape[:2])
        check_dtype("flips", flips, (torch.bool,))
        check_device("flips", flips, pixels.device)
    if side < 1:
        raise ValueError(f"side is {side}; it must be 1 or more.")
    return _cut_views(pixels, places, boxes, flips, side)


@torch.library.custom_op("aclip::cut_views", mutates_args=())
def _cut_views(
    pixels: Tensor, places: Tensor, boxes: Tensor, flips: Tensor | None, side: int
) -> Tensor:
    if use_triton(pixels):
        # Triton is imported where it runs: a machine without a GPU need not have it.
        from aclip.kernels.cut_views.kernel import launch_cut_views

        return launch_cut_views(pixels, places, boxes, flips, side)
    return cut_views_reference(pixels, places, boxes, flips, side)


@_cut_views.register_fake
def _(pixels, places, boxes, flips, side):
    return pixels.new_empty(*boxes.shape[:2], 3, side, side)
