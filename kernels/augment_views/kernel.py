"""Triton kernels of augment_views.

m view, i pixel of one channel's plane of PLANE = H * W, red/green/blue tiles of fp32 on [0, 1].
A view without blur goes from uint8 to the result in one kernel; one with blur passes through two
fp32 buffers, and the blur kernels leave at once for all other views.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from aclip.kernels.augment_views.reference import AUGMENT_PARAMS, BLUR_TAPS, GRAY
from aclip.kernels.common import INTERPRET, on_device_of

NUM_WARPS = 4
BLOCK = 2048 if INTERPRET else 1024
BUFFER_BYTES = 128 * 2**20
"""Both blur buffers together; a larger batch is done in parts."""

COLUMN = {name: tl.constexpr(index) for index, name in enumerate(AUGMENT_PARAMS)}
JITTER, BRIGHTNESS, HUE, ORDER = (COLUMN[name] for name in ("jitter", "brightness", "hue", "order"))
GRAYSCALE, BLUR_SIGMA, SOLARIZE = (COLUMN[name] for name in ("grayscale", "blur_sigma", "solarize"))
NUM_PARAMS = tl.constexpr(len(AUGMENT_PARAMS))
TAPS = tl.constexpr(BLUR_TAPS)
GRAY_R, GRAY_G, GRAY_B = (tl.constexpr(weight) for weight in GRAY)


@triton.jit
def hue_channel(sixths, high, span, corner: tl.constexpr):
    """One channel of HSV -> RGB, the closed form: no table of six cases."""
    k = sixths + corner
    k -= 6.0 * tl.floor(k / 6.0)
    return high - span * tl.minimum(tl.maximum(tl.minimum(k, 4.0 - k), 0.0), 1.0)


@triton.jit
def shift_hue(red, green, blue, hue):
    high = tl.maximum(red, tl.maximum(green, blue))
    span = high - tl.minimum(red, tl.minimum(green, blue))
    safe = tl.where(span == 0.0, 1.0, span)
    from_red, from_green = (high - red) / safe, (high - green) / safe
    from_blue = (high - blue) / safe
    sixths = tl.where(high == green, 2.0 + from_red - from_blue, 4.0 + from_green - from_red)
    sixths = tl.where(high == red, from_blue - from_green, sixths) + 6.0 * hue
    return (
        hue_channel(sixths, high, span, 5.0),
        hue_channel(sixths, high, span, 3.0),
        hue_channel(sixths, high, span, 1.0),
    )


@triton.jit
def jitter(red, green, blue, params, gray_mean, UP_TO_CONTRAST: tl.constexpr):
    """Brightness, contrast, saturation and hue in the view's own order.

    UP_TO_CONTRAST stops before contrast: what is left is the image whose mean gray it needs.
    """
    hue = tl.load(params + HUE)
    order = tl.load(params + ORDER).to(tl.int32)
    remaining = order * 0 + 228  # 0b11_10_01_00: the four operations, two bits each
    active = order * 0 + 1
    for step in tl.static_range(4):
        # The digits of `order` in the bases 4, 3, 2, 1 choose among the remaining operations.
        if step == 0:
            shift = order // 6 * 2
        elif step == 1:
            shift = order % 6 // 2 * 2
        elif step == 2:
            shift = order % 2 * 2
        else:
            shift = order * 0
        operation = (remaining >> shift) & 3
        below = remaining & ((1 << shift) - 1)
        remaining = below | ((remaining >> (shift + 2)) << shift)
        if UP_TO_CONTRAST:
            active = tl.where(operation == 1, 0, active)
        if active == 1:
            if operation == 3:
                red, green, blue = shift_hue(red, green, blue, hue)
            else:
                # Brightness mixes with black, contrast with the mean gray, saturation with gray.
                factor = tl.load(params + BRIGHTNESS + operation)
                gray = GRAY_R * red + GRAY_G * green + GRAY_B * blue
                other = tl.where(operation == 1, gray_mean, tl.where(operation == 2, gray, 0.0))
                other *= 1.0 - factor
                red = tl.minimum(tl.maximum(red * factor + other, 0.0), 1.0)
                green = tl.minimum(tl.maximum(green * factor + other, 0.0), 1.0)
                blue = tl.minimum(tl.maximum(blue * factor + other, 0.0), 1.0)
    return red, green, blue


@triton.jit
def finish(value, mean, std, solarize):
    inverted = tl.where(value >= 0.5, 1.0 - value, value)
    return (tl.where(solarize > 0.0, inverted, value) - mean) / std


@triton.jit
def gray_mean_kernel(
    views_ptr,  # (M, 3, PLANE) uint8
    params_ptr,  # (M, NUM_PARAMS) fp32
    partial_ptr,  # (M, num_programs(1)) fp32: sums of gray over a tile
    PLANE,
    BLOCK: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64)
    params = params_ptr + m * NUM_PARAMS
    out = partial_ptr + m * tl.num_programs(1) + tl.program_id(1)
    if tl.load(params + JITTER) > 0.0:
        i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        source = views_ptr + m * 3 * PLANE + i
        red = tl.load(source, mask=i < PLANE, other=0).to(tl.float32) / 255.0
        green = tl.load(source + PLANE, mask=i < PLANE, other=0).to(tl.float32) / 255.0
        blue = tl.load(source + 2 * PLANE, mask=i < PLANE, other=0).to(tl.float32) / 255.0
        red, green, blue = jitter(red, green, blue, params, 0.0, True)
        gray = GRAY_R * red + GRAY_G * green + GRAY_B * blue
        tl.store(out, tl.sum(tl.where(i < PLANE, gray, 0.0), axis=0))
    else:
        tl.store(out, 0.0)


@triton.jit
def pointwise_kernel(
    views_ptr,  # (M, 3, PLANE) uint8
    params_ptr,  # (M, NUM_PARAMS) fp32, or anything when not HAS_PARAMS
    partial_ptr,  # (M, num_programs(1)) fp32 from gray_mean_kernel
    mean_ptr,  # (3,) fp32
    std_ptr,  # (3,) fp32
    buffer_ptr,  # (M, 3, PLANE) fp32: views that are blurred go here
    out_ptr,  # (M, 3, PLANE): all others here, finished
    PLANE,
    HAS_PARAMS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,  # num_programs(1), padded
):
    m = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < PLANE
    at = m * 3 * PLANE + i
    red = tl.load(views_ptr + at, mask=inside, other=0).to(tl.float32) / 255.0
    green = tl.load(views_ptr + at + PLANE, mask=inside, other=0).to(tl.float32) / 255.0
    blue = tl.load(views_ptr + at + 2 * PLANE, mask=inside, other=0).to(tl.float32) / 255.0
    solarize = tl.full([], 0.0, tl.float32)
    sigma = tl.full([], 0.0, tl.float32)
    if HAS_PARAMS:
        params = params_ptr + m * NUM_PARAMS
        solarize = tl.load(params + SOLARIZE)
        sigma = tl.load(params + BLUR_SIGMA)
        if tl.load(params + JITTER) > 0.0:
            tiles = tl.num_programs(1)
            tile = tl.arange(0, TILES)
            sums = tl.load(partial_ptr + m * tiles + tile, mask=tile < tiles, other=0.0)
            gray_mean = tl.sum(sums, axis=0) / PLANE
            red, green, blue = jitter(red, green, blue, params, gray_mean, False)
        if tl.load(params + GRAYSCALE) > 0.0:
            gray = GRAY_R * red + GRAY_G * green + GRAY_B * blue
            red, green, blue = gray, gray, gray
    if sigma > 0.0:
        tl.store(buffer_ptr + at, red, mask=inside)
        tl.store(buffer_ptr + at + PLANE, green, mask=inside)
        tl.store(buffer_ptr + at + 2 * PLANE, blue, mask=inside)
    else:
        red = finish(red, tl.load(mean_ptr), tl.load(std_ptr), solarize)
        green = finish(green, tl.load(mean_ptr + 1), tl.load(std_ptr + 1), solarize)
        blue = finish(blue, tl.load(mean_ptr + 2), tl.load(std_ptr + 2), solarize)
        dtype = out_ptr.dtype.element_ty
        tl.store(out_ptr + at, red.to(dtype), mask=inside)
        tl.store(out_ptr + at + PLANE, green.to(dtype), mask=inside)
        tl.store(out_ptr + at + 2 * PLANE, blue.to(dtype), mask=inside)


@triton.jit
def blur_kernel(
    source_ptr,  # (M, 3, H, W) fp32
    params_ptr,  # (M, NUM_PARAMS) fp32
    mean_ptr,  # (3,) fp32
    std_ptr,  # (3,) fp32
    out_ptr,  # (M, 3, H, W): fp32 after the rows, the result after the columns
    H,
    W,
    ALONG_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Blurs along one axis; along the columns, the second of the two, it also finishes the view."""
    m = tl.program_id(0).to(tl.int64)
    params = params_ptr + m * NUM_PARAMS
    sigma = tl.load(params + BLUR_SIGMA)
    if sigma > 0.0:
        i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = i < 3 * H * W
        x, y = i % W, i // W % H
        center = x if ALONG_ROWS else y
        length = W if ALONG_ROWS else H
        stride = 1 if ALONG_ROWS else W
        first = source_ptr + m * 3 * H * W + i - center * stride
        total = sigma * 0.0
        value = tl.zeros([BLOCK], tl.float32)
        for tap in tl.static_range(TAPS):
            distance = tap - TAPS // 2
            weight = tl.exp(-0.5 * (distance / sigma) * (distance / sigma))
            total += weight
            position = tl.abs(center + distance)  # reflects at both borders
            position = tl.minimum(position, 2 * (length - 1) - position)
            value += weight * tl.load(first + position * stride, mask=inside, other=0.0)
        value /= total
        if not ALONG_ROWS:
            channel = i // (H * W)
            mean = tl.load(mean_ptr + channel, mask=inside, other=0.0)
            std = tl.load(std_ptr + channel, mask=inside, other=1.0)
            value = finish(value, mean, std, tl.load(params + SOLARIZE))
        target = out_ptr + m * 3 * H * W + i
        tl.store(target, value.to(out_ptr.dtype.element_ty), mask=inside)


def launch_augment_views(
    views: Tensor, params: Tensor | None, mean: Tensor, std: Tensor, dtype: torch.dtype
) -> Tensor:
    """The augmented views; no device value is read on the host."""
    count, _, height, width = views.shape
    views = views.contiguous()
    mean, std = mean.contiguous(), std.contiguous()
    out = torch.empty(views.shape, dtype=dtype, device=views.device)
    if count == 0:
        return out
    plane = height * width
    tiles = triton.cdiv(plane, BLOCK)
    meta = {"BLOCK": BLOCK, "num_warps": NUM_WARPS}
    padded = triton.next_power_of_2(tiles)
    with on_device_of(views):
        if params is None:
            pointwise_kernel[(count, tiles)](
                views, out, out, mean, std, out, out, plane, HAS_PARAMS=False, TILES=padded, **meta
            )
            return out
        params = params.contiguous()
        at_once = min(count, max(1, BUFFER_BYTES // (2 * 3 * plane * 4)))
        buffers = mean.new_empty(2, at_once, 3, height, width)
        partial = mean.new_empty(at_once, tiles)
        for start in range(0, count, at_once):
            stop = min(start + at_once, count)
            part, knobs, result = views[start:stop], params[start:stop], out[start:stop]
            grid = (stop - start, tiles)
            gray_mean_kernel[grid](part, knobs, partial, plane, **meta)
            pointwise_kernel[grid](
                part,
                knobs,
                partial,
                mean,
                std,
                buffers[0],
                result,
                plane,
                HAS_PARAMS=True,
                TILES=padded,
                **meta,
            )
            grid = (stop - start, triton.cdiv(3 * plane, BLOCK))
            size = (height, width)
            blur_kernel[grid](
                buffers[0], knobs, mean, std, buffers[1], *size, ALONG_ROWS=True, **meta
            )
            blur_kernel[grid](buffers[1], knobs, mean, std, result, *size, ALONG_ROWS=False, **meta)
    return out
