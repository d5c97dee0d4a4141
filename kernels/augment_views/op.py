"""augment_views as a torch op: checks, dispatch, and its fake for torch.compile."""

import torch
from torch import Tensor

from aclip.kernels.augment_views.reference import (
    AUGMENT_PARAMS,
    BLUR_TAPS,
    augment_views_reference,
)
from aclip.kernels.common import (
    FLOAT_DTYPES,
    MOVED_BYTES,
    check_device,
    check_dtype,
    check_shape,
    use_triton,
)


def augment_views(
    views: Tensor, params: Tensor | None, mean: Tensor, std: Tensor, dtype: torch.dtype
) -> Tensor:
    """Augments and normalises views: jitter, grayscale, blur, solarize, then (x - mean) / std.

    Arguments and the exact meaning are those of `augment_views_reference`. No gradient.

    Raises:
        ValueError: a shape, dtype or device does not fit, or views are too small to be blurred.
    """
    check_shape("views", views, (None, 3, None, None))
    check_dtype("views", views, (torch.uint8,))
    if params is not None:
        check_shape("params", params, (views.shape[0], len(AUGMENT_PARAMS)))
        check_dtype("params", params, (torch.float32,))
        check_device("params", params, views.device)
        if min(views.shape[2:]) <= BLUR_TAPS // 2:
            raise ValueError(
                f"views are {views.shape[2]} x {views.shape[3]} pixels; a blur of {BLUR_TAPS} taps "
                f"needs {BLUR_TAPS // 2 + 1} or more a side."
            )
    for name, tensor in (("mean", mean), ("std", std)):
        check_shape(name, tensor, (3,))
        check_dtype(name, tensor, (torch.float32,))
        check_device(name, tensor, views.device)
    if dtype not in FLOAT_DTYPES:
        raise ValueError(f"dtype is {dtype}; it must be float32, float16 or bfloat16.")
    return _augment_views(views, params, mean, std, dtype)


@torch.library.custom_op("aclip::augment_views", mutates_args=())
def _augment_views(
    views: Tensor, params: Tensor | None, mean: Tensor, std: Tensor, dtype: torch.dtype
) -> Tensor:
    if use_triton(views):
        # Triton is imported where it runs: a machine without a GPU need not have it.
        from aclip.kernels.augment_views.kernel import launch_augment_views

        return launch_augment_views(views, params, mean, std, dtype)
    return augment_views_reference(views, params, mean, std, dtype)


@_augment_views.register_fake
def _(views, params, mean, std, dtype):
    return views.new_empty(views.shape, dtype=dtype)


def _moved_bytes(views: Tensor, params: Tensor | None, mean, std, dtype: torch.dtype) -> int:
    """Contrast reads the views once more. Not counted: the buffers of those that are blurred."""
    num_reads = 1 if params is None else 2
    return num_reads * views.nbytes + views.numel() * dtype.itemsize


MOVED_BYTES[torch.ops.aclip.augment_views] = _moved_bytes
