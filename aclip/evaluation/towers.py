"""A pair of encoders and what they read."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from aclip.data.tokenizer import Tokenizer

Encoder = Callable[[Tensor], Tensor]
"""Turns a batch of n into raw_embeds (n, E)."""


Progress = Callable[[str, int, int], None]
"""progress(words, done, total) says in words what is counted on this rank, and how far it is."""


@dataclass(frozen=True)
class Towers:
    """A pair of encoders in eval mode and what they read.

    Attributes:
        encode_image: (n, 3, R, R) normalised pixels of `dtype` on `device` -> (n, E).
        encode_text: n captions' Tokens on `device` -> (n, E).
        tokenizer: the text tower's tokenizer.
        resolution: R, the side of an image in pixels.
        device: where the encoders are.
        dtype: the dtype of the pixels that they read.
        mean, std: each channel's, for pixels in [0, 1].
        resample: how an image is scaled to R.
    """

    encode_image: Encoder
    encode_text: Encoder
    tokenizer: Tokenizer
    resolution: int
    device: torch.device
    dtype: torch.dtype
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resample: Image.Resampling = Image.Resampling.BILINEAR


def image_embedder(towers: Towers) -> Callable[[Tensor], Tensor]:
    """The function from (n, 3, R, R) uint8 to (n, E) fp32, L2-normalised."""
    raw = image_encoder(towers, towers.encode_image)
    return lambda images: F.normalize(raw(images), dim=-1)


def image_encoder(towers: Towers, encode: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The function from (n, 3, R, R) uint8 to the fp32 of what `encode` makes of its pixels."""
    mean, std = (
        torch.tensor(values, device=towers.device).view(3, 1, 1)
        for values in (towers.mean, towers.std)
    )

    def run(images: Tensor) -> Tensor:
        pixels = images.to(towers.device).float().div_(255).sub_(mean).div_(std)
        return encode(pixels.to(towers.dtype)).float()

    return run
