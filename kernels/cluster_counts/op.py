"""cluster_counts as a torch op: checks, dispatch, its fake for torch.compile, and what it costs."""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from aclip.kernels.cluster_counts.reference import cluster_counts_reference
from aclip.kernels.common import (
    FLOAT_DTYPES,
    check_device,
    check_dtype,
    check_shape,
    use_triton,
)


def cluster_counts(views: Tensor, anchors: Tensor, patch_size: int, threshold: float) -> Tensor:
    """Counts the anchors whose cluster holds a patch, for every patch of every view; no gradient.

    Arguments, result and the exact meaning are those of `cluster_counts_reference`.

    Raises:
        ValueError: a shape, dtype or device does not fit. On CUDA the anchors' ids are not
            checked, since reading them would wait for the device.
    """
    check_shape("views", views, (None, 3, None, None))
    check_dtype("views", views, FLOAT_DTYPES)
    height, width = views.shape[2:]
    if height != width or patch_size < 1 or width % patch_size:
        raise ValueError(
            f"views are {height} x {width} pixels; they must be square, and patch_size "
            f"{patch_size} must divide the side."
        )
    check_shape("anchors", anchors, (views.shape[0], None))
    check_dtype("anchors", anchors, (torch.int64,))
    check_device("anchors", anchors, views.device)
    return _cluster_counts(views.detach(), anchors, patch_size, float(threshold))


@torch.library.custom_op("aclip::cluster_counts", mutates_args=())
def _cluster_counts(views: Tensor, anchors: Tensor, patch_size: int, threshold: float) -> Tensor:
    if use_triton(views):
        # Triton is imported where it runs: a machine without a GPU need not have it.
        from aclip.kernels.cluster_counts.kernel import launch_cluster_counts

        return launch_cluster_counts(views, anchors, patch_size, threshold)
    return cluster_counts_reference(views, anchors, patch_size, threshold)


@_cluster_counts.register_fake
def _(views, anchors, patch_size, threshold):
    num_patches = (views.shape[3] // patch_size) ** 2
    return views.new_empty(views.shape[0], num_patches, dtype=torch.int32)


@register_flop_formula(torch.ops.aclip.cluster_counts)
def _flops(views, anchors, patch_size, threshold, out_shape=None) -> int:
    """Each value of a view meets the one at its place in each anchor."""
    return 2 * views[1] * views[2] * views[3] * anchors[0] * anchors[1]
