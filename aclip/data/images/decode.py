"""Encoded bytes to RGB pixels."""

import io
import logging
import struct
import warnings
import zlib
from collections.abc import Callable

import numpy as np
import simplejpeg
from PIL import Image

from aclip.data.shards.listing import Skip

JPEG_START = b"\xff\xd8\xff"


FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""What a file of an image's suffix may hold; Pillow's other decoders are not offered bytes."""

# A damaged TIFF is counted; Pillow would print a line for each besides.
logging.getLogger("PIL.TiffImagePlugin").setLevel(logging.CRITICAL)

# What Pillow's decoders raise on damaged bytes.
DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    OverflowError,
    IndexError,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)


def decode_image(content: bytes, min_side: int = 1) -> Image.Image | Skip:
    """Decodes an image to RGB.

    Returns:
        The image, or Skip: "unreadable_image" (damaged, of no known format, or with more pixels
        than Image.MAX_IMAGE_PIXELS), "image_too_small" (a side under `min_side` pixels).
    """
    pixels = _decode_jpeg(content, min_side)
    if isinstance(pixels, np.ndarray):
        return Image.fromarray(pixels)
    return _decode_with_pillow(content, min_side) if pixels is None else pixels


def decode_pixels(
    content: bytes, min_side: int = 1, room: Callable[[int, int], np.ndarray | None] | None = None
) -> np.ndarray | Skip:
    """As decode_image, the same pixels as (H, W, 3) uint8.

    Args:
        room: room(height, width) gives the bytes to decode into, or None for new ones. Pillow's
            decoders don't ask.
    """
    pixels = _decode_jpeg(content, min_side, room)
    if pixels is not None:
        return pixels
    image = _decode_with_pillow(content, min_side)
    return image if isinstance(image, Skip) else np.asarray(image)


def _decode_jpeg(
    content: bytes, min_side: int, room: Callable[[int, int], np.ndarray | None] | None = None
) -> np.ndarray | Skip | None:
    """(H, W, 3) uint8, equal to Pillow's bit by bit, in less time; None where Pillow must decide:
    no JPEG, other colours than YCbCr and gray, or anything in it that libjpeg warns of."""
    if not content.startswith(JPEG_START):
        return None
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(content)
        if colors not in ("YCbCr", "Gray"):
            return None
        if Image.MAX_IMAGE_PIXELS is not None and height * width > Image.MAX_IMAGE_PIXELS:
            return Skip("unreadable_image")
        if min(height, width) < min_side:
            return Skip("image_too_small")
        return simplejpeg.decode_jpeg(content, buffer=room(height, width) if room else None)
    except ValueError:
        return None


def _decode_with_pillow(content: bytes, min_side: int) -> Image.Image | Skip:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            image = Image.open(io.BytesIO(content), formats=FORMATS)
            if min(image.size) < min_side:
                return Skip("image_too_small")
            return to_rgb(image)
        except DECODE_ERRORS:
            return Skip("unreadable_image")


def to_rgb(image: Image.Image) -> Image.Image:
    """The image in 8 bit RGB; of 16 bit grayscale the high byte, where Pillow would clip.

    Raises:
        ValueError: grayscale in numbers of 32 bit (TIFF): nothing tells which of them is white.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode}")
    return image.convert("RGB")
