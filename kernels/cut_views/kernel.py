"""Triton kernel of cut_views.

m view, b its image, y and x row and column of the view, tap one of the source pixels under a
triangle. A program makes a tile of one view from the pixels under it: the weights of both axes are
made in registers where they are used, and no matrix of them, no padded image and no half-resampled
one exists.
"""

import triton
import triton.language as tl
from torch import Tensor

from aclip.kernels.common import INTERPRET, on_device_of

NUM_WARPS = 4
BLOCK_Y, BLOCK_X = (32, 32) if INTERPRET else (16, 32)
ROUND = tl.constexpr(1.5 * 2**23)
"""fp32 has no digits behind the point from here on, so adding it rounds half to even."""


@triton.jit
def triangles(start, length, index, SIDE):
    """Of the view's rows or columns `index`: centre, slope, first tap, number of taps.

    The triangle is open at both ends, so that at most ceil(2 * support) pixels have a weight.
    """
    scale = length / SIDE
    support = tl.maximum(scale, 1.0)
    center = start + (index.to(tl.float32) + 0.5) * scale
    first = tl.maximum(tl.floor(center - support + 0.5), 0.0).to(tl.int32)
    return center, 1.0 / support, first, tl.ceil(2.0 * support).to(tl.int32)


@triton.jit
def weight_of(position, center, slope, size):
    """The triangle's height over source pixels; 0 behind the image's end."""
    height = 1.0 - tl.abs(position.to(tl.float32) + 0.5 - center) * slope
    return tl.where(position < size, tl.maximum(height, 0.0), 0.0)


@triton.jit
def to_level(value):
    return tl.minimum(tl.maximum((value + ROUND) - ROUND, 0.0), 255.0).to(tl.uint8)


@triton.jit
def cut_views_kernel(
    pixels_ptr,  # (P, 3) uint8
    places_ptr,  # (B, 4) int64: height, width, factor, first pixel
    boxes_ptr,  # (M, 4) int: top, left, height, width before the image was reduced
    flips_ptr,  # (M,) bool, or anything when not HAS_FLIPS
    out_ptr,  # (M, 3, SIDE, SIDE) uint8
    V,
    SIDE,
    HAS_FLIPS: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64)
    tiles_x = tl.cdiv(SIDE, BLOCK_X)
    y = tl.program_id(1) // tiles_x * BLOCK_Y + tl.arange(0, BLOCK_Y)
    x = tl.program_id(1) % tiles_x * BLOCK_X + tl.arange(0, BLOCK_X)
    place, box = places_ptr + m // V * 4, boxes_ptr + m * 4
    height, width = tl.load(place).to(tl.int32), tl.load(place + 1).to(tl.int32)
    factor, first = tl.load(place + 2).to(tl.float32), tl.load(place + 3)
    top, left = tl.load(box).to(tl.float32) / factor, tl.load(box + 1).to(tl.float32) / factor
    box_height = tl.load(box + 2).to(tl.float32) / factor
    box_width = tl.load(box + 3).to(tl.float32) / factor
    column = x
    if HAS_FLIPS:
        column = tl.where(tl.load(flips_ptr + m) != 0, SIDE - 1 - x, x)
    center_y, slope_y, first_y, taps_y = triangles(top, box_height, y, SIDE)
    center_x, slope_x, first_x, taps_x = triangles(left, box_width, column, SIDE)

    red = tl.zeros([BLOCK_Y, BLOCK_X], tl.float32)
    green = tl.zeros([BLOCK_Y, BLOCK_X], tl.float32)
    blue = tl.zeros([BLOCK_Y, BLOCK_X], tl.float32)
    sum_y = tl.zeros([BLOCK_Y], tl.float32)
    sum_x = tl.zeros([BLOCK_X], tl.float32)
    for tap_x in range(taps_x):
        sum_x += weight_of(first_x + tap_x, center_x, slope_x, width)
    for tap_y in range(taps_y):
        source_y = first_y + tap_y
        weight_y = weight_of(source_y, center_y, slope_y, height)
        sum_y += weight_y
        row = pixels_ptr + (first + source_y.to(tl.int64) * width) * 3
        row_red = tl.zeros([BLOCK_Y, BLOCK_X], tl.float32)
        row_green = tl.zeros([BLOCK_Y, BLOCK_X], tl.float32)
        row_blue = tl.zeros([BLOCK_Y, BLOCK_X], tl.float32)
        for tap_x in range(taps_x):
            source_x = first_x + tap_x
            weight_x = weight_of(source_x, center_x, slope_x, width)[None, :]
            at = row[:, None] + source_x[None, :] * 3
            # What has no weight is not read: it may lie outside of the image.
            read = (weight_y[:, None] > 0.0) & (weight_x > 0.0)
            row_red += weight_x * tl.load(at, mask=read, other=0).to(tl.float32)
            row_green += weight_x * tl.load(at + 1, mask=read, other=0).to(tl.float32)
            row_blue += weight_x * tl.load(at + 2, mask=read, other=0).to(tl.float32)
        red += weight_y[:, None] * row_red
        green += weight_y[:, None] * row_green
        blue += weight_y[:, None] * row_blue
    # Without a pixel under it, as behind the view's end, a place gets 0 rather than 0 / 0.
    total = sum_y[:, None] * sum_x[None, :]
    total = tl.where(total > 0.0, total, 1.0)
    out = out_ptr + m * 3 * SIDE * SIDE + y[:, None] * SIDE + x[None, :]
    inside = (y[:, None] < SIDE) & (x[None, :] < SIDE)
    tl.store(out, to_level(red / total), mask=inside)
    tl.store(out + SIDE * SIDE, to_level(green / total), mask=inside)
    tl.store(out + 2 * SIDE * SIDE, to_level(blue / total), mask=inside)


def launch_cut_views(
    pixels: Tensor, places: Tensor, boxes: Tensor, flips: Tensor | None, side: int
) -> Tensor:
    """The views, in one launch; no device value is read on the host."""
    num_images, num_views = boxes.shape[:2]
    out = pixels.new_empty(num_images, num_views, 3, side, side)
    if out.numel() == 0:
        return out
    pixels, places, boxes = pixels.contiguous(), places.contiguous(), boxes.contiguous()
    tiles = triton.cdiv(side, BLOCK_Y) * triton.cdiv(side, BLOCK_X)
    with on_device_of(pixels):
        cut_views_kernel[(num_images * num_views, tiles)](
            pixels,
            places,
            boxes,
            out if flips is None else flips.contiguous(),
            out,
            num_views,
            side,
            HAS_FLIPS=flips is not None,
            BLOCK_Y=BLOCK_Y,
            BLOCK_X=BLOCK_X,
            num_warps=NUM_WARPS,
        )
    return out
