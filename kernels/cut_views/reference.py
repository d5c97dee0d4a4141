"""cut_views in plain torch: the public meaning of the op, and its path on CPU.

A view is rows . image . columns, with the weights of Pillow's antialiased bilinear filter in two
small matrices, for many images at once.
"""

import torch
from torch import Tensor

PLACES = ("height", "width", "factor", "first")
"""Columns of `places`, in order."""
IMAGES_AT_ONCE = 32
"""This many images are padded to one size and resampled together, to bound the memory."""


def cut_views_reference(
    pixels: Tensor, places: Tensor, boxes: Tensor, flips: Tensor | None, side: int
) -> Tensor:
    """Cuts boxes out of whole images, resamples them to squares and mirrors some of them.

    Args:
        pixels: (P, 3) uint8, all pixels of the first image row by row, then of the next.
        places: (B, 4) int64 with the columns PLACES: an image's height and width in `pixels`, how
            many times it was reduced before, and where in `pixels` it begins.
        boxes: (B, V, 4) int32 or int64, (top, left, height, width) inside of an image, in pixels
            that it had before it was reduced.
        flips: (B, V) bool, whether a view is mirrored left to right; None for none.
        side: R, the side of a view in pixels.

    Returns:
        (B, V, 3, R, R) uint8: bilinear, antialiased where a box shrinks. A view is rounded once,
        half to even, so it is within half a level of 255 of the exact value. Pillow rounds after
        each axis and lies within one level of it, so the two are one level apart at most. All
        arithmetic is fp32. No gradient.

    Source: Image.resize(box=...) of Pillow, src/libImaging/Resample.c.
    """
    parts = []
    for start in range(0, len(places), IMAGES_AT_ONCE):
        rows = slice(start, start + IMAGES_AT_ONCE)
        parts.append(_resample(_pad(pixels, places[rows]), places[rows], boxes[rows], side))
    if not parts:
        return pixels.new_empty(*boxes.shape[:2], 3, side, side)
    views = torch.cat(parts)
    if flips is None:
        return views
    return torch.where(flips[:, :, None, None, None], views.flip(-1), views)


def _pad(pixels: Tensor, places: Tensor) -> Tensor:
    """The images in one size, (B, H, W, 3) uint8; the padding holds pixels of no weight."""
    heights, widths, _, first = places.unbind(1)
    height, width = places[:, :2].amax(0).tolist()
    y = torch.minimum(torch.arange(height, device=places.device), heights.view(-1, 1) - 1)
    x = torch.minimum(torch.arange(width, device=places.device), widths.view(-1, 1) - 1)
    ids = first.view(-1, 1, 1) + y.unsqueeze(2) * widths.view(-1, 1, 1) + x.unsqueeze(1)
    return pixels[ids]


def _resample(images: Tensor, places: Tensor, boxes: Tensor, side: int) -> Tensor:
    images = images.float()
    factors = places[:, 2].view(-1, 1)
    top, left, height, width = (boxes.float() / factors.unsqueeze(2)).unbind(2)
    rows = resampling_weights(top, height, places[:, :1], images.shape[1], side)
    columns = resampling_weights(left, width, places[:, 1:2], images.shape[2], side)
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
