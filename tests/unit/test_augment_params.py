"""What the workers draw for augment_views, and what augment hands on to it."""

import math

import numpy as np
import pytest
import torch

from aclip.config.sections import AugmentConfig
from aclip.data.images.augment import augment, draw_augment_params
from aclip.kernels.augment_views import AUGMENT_PARAMS

CONFIG = AugmentConfig()


def draw_columns(config: AugmentConfig, count: int, seed: int = 0) -> dict[str, np.ndarray]:
    params = draw_augment_params(np.random.default_rng(seed), config, count)
    assert params.shape == (count, 9) and params.dtype == np.float32
    return dict(zip(AUGMENT_PARAMS, params.T, strict=True))


@pytest.mark.parametrize(
    ("column", "low", "high"),
    [
        ("brightness", 0.6, 1.4),
        ("contrast", 0.6, 1.4),
        ("saturation", 0.8, 1.2),
        ("hue", -0.1, 0.1),
    ],
)
def test_factors_fill_the_range_of_color_jitter(column, low, high):
    values = draw_columns(CONFIG, 4000)[column]
    margin = (high - low) / 100
    assert low <= values.min() + 1e-6 < low + margin
    assert high - margin < values.max() - 1e-6 <= high


def test_factors_of_a_strength_over_one_stay_positive():
    values = draw_columns(AugmentConfig(jitter=(1.5, 0.4, 0.4, 0.1)), 4000)["brightness"]
    assert 0 <= values.min() < 0.02 and 2.48 < values.max() <= 2.5


@pytest.mark.parametrize(
    ("column", "probability"),
    [("jitter", 0.8), ("grayscale", 0.2), ("blur_sigma", 0.1), ("solarize", 0.2)],
)
def test_each_augmentation_happens_with_its_probability(column, probability):
    happens = draw_columns(CONFIG, 4000)[column] > 0
    assert abs(happens.mean() - probability) < 4 * math.sqrt(probability * (1 - probability) / 4000)


def test_blur_sigma_is_none_or_in_its_range():
    sigma = draw_columns(CONFIG, 4000)["blur_sigma"]
    drawn = sigma[sigma > 0]
    assert 0.1 <= drawn.min() < 0.15 and 1.95 < drawn.max() <= 2.0


def test_every_order_of_the_four_jitters_is_drawn():
    assert set(draw_columns(CONFIG, 4000)["order"]) == set(range(24))


def test_the_same_numbers_are_drawn_whatever_happens():
    never = AugmentConfig(jitter_prob=0, grayscale_prob=0, blur_prob=0, solarize_prob=0)
    first, second = np.random.default_rng(3), np.random.default_rng(3)
    draw_augment_params(first, CONFIG, 2)
    draw_augment_params(second, never, 2)
    assert first.random() == second.random()


def test_views_are_augmented_apart_and_alike_for_one_seed():
    first, again, other = (
        draw_augment_params(np.random.default_rng(seed), CONFIG, 2) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other) and not np.array_equal(first[0], first[1])


def test_without_params_views_are_only_normalised():
    views = torch.full((2, 3, 8, 8), 51, dtype=torch.uint8)
    pixels = augment(views, None, CONFIG, torch.float32)
    expected = [(0.2 - mean) / std for mean, std in zip(CONFIG.mean, CONFIG.std, strict=True)]
    for channel in range(3):
        torch.testing.assert_close(
            pixels[:, channel], torch.full((2, 8, 8), expected[channel]), rtol=1e-5, atol=1e-6
        )


def test_solarized_views_are_inverted_from_one_half_on():
    config = AugmentConfig(jitter_prob=0, grayscale_prob=0, blur_prob=0, solarize_prob=1)
    config = config.model_copy(update={"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)})
    views = torch.tensor([51, 204], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 8, 8)
    params = torch.from_numpy(draw_augment_params(np.random.default_rng(0), config, 2))
    pixels = augment(views.contiguous(), params, config, torch.float32)
    torch.testing.assert_close(pixels, torch.full((2, 3, 8, 8), 0.2))
