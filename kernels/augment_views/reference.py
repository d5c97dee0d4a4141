"""augment_views in plain torch: the public meaning of the op, and its path on CPU."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

AUGMENT_PARAMS = (
    "jitter",
    "brightness",
    "contrast",
    "saturation",
    "hue",
    "order",
    "grayscale",
    "blur_sigma",
    "solarize",
)
"""Columns of `params`, in order."""

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
BLUR_TAPS = 13
GRAY = (0.2989, 0.587, 0.114)


def augment_views_reference(
    views: Tensor, params: Tensor | None, mean: Tensor, std: Tensor, dtype: torch.dtype
) -> Tensor:
    """Augments and normalises views: jitter, grayscale, blur, solarize, then (x - mean) / std.

    Args:
        views: (M, 3, R, R) uint8.
        params: (M, 9) fp32 with the columns AUGMENT_PARAMS, or None for normalisation only:
            jitter 0 or 1; factors of brightness, contrast and saturation, 0 or more; hue shift in
            turns; order, 0 to 23, index into itertools.permutations(range(4)) of (brightness,
            contrast, saturation, hue); grayscale 0 or 1; blur_sigma in pixels, 0 for none, with 13
            taps and reflected borders; solarize 0 or 1, inverts values from 0.5 up.
        mean, std: (3,) fp32, each channel's, for images in [0, 1].
        dtype: the result's dtype.

    Returns:
        (M, 3, R, R) in `dtype`; all arithmetic is fp32 on [0, 1]. No gradient.

    Source: the same as torchvision.transforms.v2.functional on float images, one image at a time.
    """
    images = views.contiguous().float() / 255
    if params is not None and views.shape[0] > 0:
        columns = dict(zip(AUGMENT_PARAMS, params.unbind(1), strict=True))
        images = _jitter(images, columns)
        images = _where(columns["grayscale"] > 0, images, _to_gray)
        sigma = columns["blur_sigma"]
        images = _where(sigma > 0, images, _blur, torch.where(sigma > 0, sigma, 1.0))
        images = _where(columns["solarize"] > 0, images, _solarize)
    return images.sub_(mean.view(3, 1, 1)).div_(std.view(3, 1, 1)).to(dtype)


def _where(
    needed: Tensor, images: Tensor, change: Callable[..., Tensor], *factors: Tensor
) -> Tensor:
    """Applies `change` to the needed images; on CPU only those are computed, in place.

    On CUDA, asking which ones those are would wait for the device, so all are computed there.
    """
    if images.is_cpu and not torch.compiler.is_compiling():
        rows = needed.nonzero().squeeze(1)
        if rows.numel() > 0:
            images[rows] = change(images[rows], *(factor[rows] for factor in factors))
        return images
    return torch.where(needed.view(-1, 1, 1, 1), change(images, *factors), images)


def _jitter(images: Tensor, columns: dict[str, Tensor]) -> Tensor:
    jitter = columns["jitter"] > 0
    factors = torch.stack([columns[name] for name in ("brightness", "contrast", "saturation")])
    for operation in _operations(columns["order"]):
        factor = factors.gather(0, operation.clamp_max(SATURATION).unsqueeze(0)).squeeze(0)
        images = _where(jitter & (operation != HUE), images, _blend, factor, operation)
        images = _where(jitter & (operation == HUE), images, _shift_hue, columns["hue"])
    return images


def _operations(order: Tensor) -> list[Tensor]:
    """Four (M,) int64 tensors: the operation at each place of permutation number `order`.

    The number's digits in the bases 4, 3, 2, 1 say which of the remaining operations comes next;
    those are held as two bits each of one integer.
    """
    order = order.long()
    remaining = torch.full_like(order, 0b11_10_01_00)
    operations = []
    for place in (6, 2, 1, 1):
        shift = order // place * 2
        order = order % place
        operations.append((remaining >> shift) & 3)
        below = (1 << shift) - 1
        remaining = (remaining & below) | ((remaining >> 2) & ~below)
    return operations


def _gray(images: Tensor) -> Tensor:
    red, green, blue = images.unbind(1)
    return (red * GRAY[0]).add_(green, alpha=GRAY[1]).add_(blue, alpha=GRAY[2]).unsqueeze(1)


def _to_gray(images: Tensor) -> Tensor:
    return _gray(images).expand_as(images)


def _blend(images: Tensor, factor: Tensor, operation: Tensor) -> Tensor:
    """Brightness mixes with black, contrast with the mean gray, saturation with the own gray."""
    factor, operation = factor.view(-1, 1, 1, 1), operation.view(-1, 1, 1, 1)
    gray = _gray(images)
    gray = torch.where(operation == CONTRAST, gray.mean((2, 3), keepdim=True), gray)
    other = gray * ((1 - factor) * (operation != BRIGHTNESS))
    return (images * factor).add_(other).clamp_(0, 1)


def _shift_hue(images: Tensor, hue: Tensor) -> Tensor:
    """RGB -> HSV, hue + shift, -> RGB, the way back in the closed form without a table."""
    red, green, blue = images.unbind(1)
    # Not aminmax, which over so short an outer dimension is many times slower.
    low, high = red.minimum(green).minimum(blue), red.maximum(green).maximum(blue)
    span = high - low
    is_gray = span == 0
    from_max = (high.unsqueeze(1) - images) / torch.where(is_gray, 1.0, span).unsqueeze(1)
    red_part, green_part, blue_part = from_max.unbind(1)
    sixths = torch.where(high == green, 2 + red_part - blue_part, 4 + green_part - red_part)
    sixths = torch.where(high == red, blue_part - green_part, sixths)
    sixths = sixths + 6 * hue.view(-1, 1, 1)
    corners = 5 - 2 * torch.arange(3, device=images.device)
    place = (sixths.unsqueeze(1) + corners.view(3, 1, 1)).remainder_(6)
    share = torch.minimum(place, 4 - place).clamp_(0, 1)
    return torch.addcmul(high.unsqueeze(1), share, span.unsqueeze(1), value=-1)


def _blur(images: Tensor, sigma: Tensor) -> Tensor:
    count, channels, height, width = images.shape
    half = BLUR_TAPS // 2
    taps = torch.arange(-half, half + 1, device=images.device)
    weights = torch.softmax(-0.5 * (taps / sigma.unsqueeze(1)) ** 2, dim=1)  # (M, taps)
    weights = weights.repeat_interleave(channels, 0).view(-1, 1, 1, BLUR_TAPS)
    planes = F.pad(images, (half, half, half, half), mode="reflect").view(
        1, count * channels, height + 2 * half, width + 2 * half
    )
    planes = F.conv2d(planes, weights, groups=count * channels)
    planes = F.conv2d(planes, weights.transpose(2, 3), groups=count * channels)
    return planes.view(count, channels, height, width)


def _solarize(images: Tensor) -> Tensor:
    return torch.where(images >= 0.5, 1 - images, images)
