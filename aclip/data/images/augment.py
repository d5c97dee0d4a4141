"""Colour augmentation: parameters are drawn per sample in the workers, applied on the device."""

import functools
import math

import numpy as np
import torch
from torch import Tensor

from aclip.config.sections import AugmentConfig, ColorConfig
from aclip.kernels.augment_views import AUGMENT_PARAMS, augment_views

NUM_ORDERS = math.factorial(4)
"""Number of orders in which brightness, contrast, saturation and hue can be changed."""


def draw_augment_params(
    rng: np.random.Generator, config: ColorConfig, num_views: int
) -> np.ndarray:
    """Draws what augment_views does to each view; every call draws equally many numbers.

    Returns:
        (V, 9) fp32, columns AUGMENT_PARAMS. Factors follow torchvision's ColorJitter: uniform in
        [max(0, 1 - x), 1 + x], the hue shift uniform in [-hue, hue].
    """
    brightness, contrast, saturation, hue = config.jitter

    def factor(strength: float) -> np.ndarray:
        return rng.uniform(max(0.0, 1 - strength), 1 + strength, num_views)

    def happens(probability: float) -> np.ndarray:
        return rng.random(num_views) < probability

    columns = {
        "jitter": happens(config.jitter_prob),
        "brightness": factor(brightness),
        "contrast": factor(contrast),
        "saturation": factor(saturation),
        "hue": rng.uniform(-hue, hue, num_views),
        "order": rng.integers(NUM_ORDERS, size=num_views),
        "grayscale": happens(config.grayscale_prob),
        "blur_sigma": happens(config.blur_prob) * rng.uniform(*config.blur_sigma, num_views),
        "solarize": happens(config.solarize_prob),
    }
    return np.stack([columns[name] for name in AUGMENT_PARAMS], axis=1).astype(np.float32)


def augment(
    views: Tensor, params: Tensor | None, config: AugmentConfig, dtype: torch.dtype
) -> Tensor:
    """Augments and normalises uint8 views on their device.

    Args:
        views: (M, 3, R, R) uint8.
        params: (M, 9) fp32 from draw_augment_params, or None for normalisation only.
        config: gives the mean and the standard deviation to normalise with.
        dtype: the result's dtype.

    Returns:
        (M, 3, R, R) in `dtype`, no gradient.
    """
    mean, std = (_on_device(values, views.device) for values in (config.mean, config.std))
    return augment_views(views, params, mean, std, dtype)


@functools.cache
def _on_device(values: tuple[float, ...], device: torch.device) -> Tensor:
    """(3,) fp32, filled on the device: a copy from plain memory would wait for what runs there."""
    return torch.stack([torch.full((), value, device=device) for value in values])
