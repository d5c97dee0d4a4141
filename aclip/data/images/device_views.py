"""The views that are cut on the device from a batch's whole images.

A view is rows . image . columns, with the weights of Pillow's antialiased bilinear filter in two
small matrices, for all images of a batch at once.
"""

import torch
from torch import Tensor

from aclip.data.images.whole_images import WholeImages

IMAGES_AT_ONCE = 32
"""This many images are padded to one size and resampled together, to bound the device's memory."""


def cut_views_on_device(
    whole: WholeImages,
    student_boxes: Tensor,
    teacher_box: Tensor | None,
    resolution: int,
    teacher_resolution: int | None,
) -> dict[str, Tensor | None]:
    """Cuts a batch's views on the device where its images lie.

    Args:
        whole: B images, on any device.
        student_boxes: (B, V, 4) int32, in pixels of the images before they were reduced; on the
            images' device.
        teacher_box: (B, 4) int32, likewise; None if there is no teacher view.
        resolution: R, the side of a student view and of a view for SimCLR in pixels.
        teacher_resolution: T, the side of a teacher view in pixels.

    Returns:
        student_views (B, V, 3, R, R), teacher_view (B, 3, T, T) or None, ssl_views (B, S, 3, R, R)
        or None; uint8, each within 1 level of what views.crop gives for an image not reduced.
    """
    wanted = {"student_views": (student_boxes, resolution)}
    if teacher_box is not None:
        wanted["teacher_view"] = (teacher_box.unsqueeze(1), teacher_resolution)
    if whole.ssl_boxes is not None:
        wanted["ssl_views"] = (whole.ssl_boxes, resolution)
    # In fp16 a pixel is exact, and weights so rounded move a view by less than half a level.
    dtype = torch.float16 if whole.pixels.is_cuda else torch.float32
    cut: dict[str, list[Tensor]] = {name: [] for name in wanted}
    for start in range(0, len(whole), IMAGES_AT_ONCE):
        rows = slice(start, start + IMAGES_AT_ONCE)
        images, sizes = _pad(whole[rows])
        for name, (boxes, side) in wanted.items():
            cut[name].append(_resample(images, sizes, boxes[rows], side, dtype))
    views = {"teacher_view": None, "ssl_views": None}
    views.update({name: torch.cat(parts) for name, parts in cut.items()})
    if views["teacher_view"] is not None:
        views["teacher_view"] = views["teacher_view"].squeeze(1)
    if views["ssl_views"] is not None:
        flips = whole.ssl_flips[:, :, None, None, None]
        views["ssl_views"] = torch.where(flips, views["ssl_views"].flip(-1), views["ssl_views"])
    return views


def _pad(whole: WholeImages) -> tuple[Tensor, Tensor]:
    """Images of one size (B, H, W, 3) uint8, and their own sizes (B, 3) int64 on the same device.

    The padding holds pixels that are never read. No value is read back from the device.
    """
    device = whole.pixels.device
    height, width, _ = whole.sizes.amax(0).tolist()
    places = torch.cat([whole.sizes.long(), whole.ends.unsqueeze(1)], dim=1)
    if device.type == "cuda":
        places = places.pin_memory()
    places = places.to(device, non_blocking=True)
    heights, widths = places[:, 0], places[:, 1]
    first = (places[:, 3] - heights * widths).view(-1, 1, 1)
    y = torch.minimum(torch.arange(height, device=device), heights.view(-1, 1) - 1)
    x = torch.minimum(torch.arange(width, device=device), widths.view(-1, 1) - 1)
    ids = first + y.unsqueeze(2) * widths.view(-1, 1, 1) + x.unsqueeze(1)
    return whole.pixels[ids], places[:, :3]


def _resample(
    images: Tensor, sizes: Tensor, boxes: Tensor, side: int, dtype: torch.dtype
) -> Tensor:
    """Views of boxes (B, K, 4) as (B, K, 3, side, side) uint8; products are computed in `dtype`.

    A view is rounded once, so it is within half a level of the exact value. Pillow rounds after
    each axis and lies within one level of it, so the two are one level apart at most.
    """
    images = images.to(dtype)
    factors = sizes[:, 2].view(-1, 1)
    top, left, height, width = (boxes.float() / factors.unsqueeze(2)).unbind(2)
    rows = resampling_weights(top, height, sizes[:, :1], images.shape[1], side).to(dtype)
    columns = resampling_weights(left, width, sizes[:, 1:2], images.shape[2], side).to(dtype)
    narrow = torch.einsum("bkxw,bhwc->bkhxc", columns, images)
    views = torch.einsum("bkyh,bkhxc->bkcyx", rows, narrow).round_().clamp_(0, 255)
    return views.to(torch.uint8).contiguous()


def resampling_weights(
    start: Tensor, length: Tensor, size: Tensor, padded: int, side: int
) -> Tensor:
    """Weights of Pillow's BILINEAR filter along one axis, antialiased where it shrinks.

    Args:
        start, length: (B, K) float, interval of the axis that becomes `side` pixels.
        size: (B, 1) int, length of each image's axis in pixels.
        padded: length of the padded images' axis in pixels.
        side: length of the view's axis in pixels.

    Returns:
        (B, K, side, padded) fp32; each row sums to 1 and is 0 from the image's size on.

    Source: precompute_coeffs in Pillow's src/libImaging/Resample.c.
    """
    start, length, size = (value.unsqueeze(-1) for value in (start, length, size))
    scale = length / side
    support = scale.clamp_min(1)  # of the triangle, each way
    center = start + (torch.arange(side, device=start.device) + 0.5) * scale  # (B, K, side)
    first = (center - support + 0.5).trunc().clamp_min(0).unsqueeze(-1)
    last = torch.minimum((center + support + 0.5).trunc(), size).unsqueeze(-1)
    pixel = torch.arange(padded, device=start.device)
    weights = 1 - (pixel + 0.5 - center.unsqueeze(-1)).abs() / support.unsqueeze(-1)
    weights = weights.clamp_min(0) * ((pixel >= first) & (pixel < last))
    return weights / weights.sum(-1, keepdim=True)
