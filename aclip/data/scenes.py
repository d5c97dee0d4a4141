"""Draws captioned scenes: a small object on a cluttered background, with its box and mask.

Objects are pictographs of DejaVu Sans, the font that matplotlib ships. A change of the drawing
needs a new VERSION in demo.py.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

IMAGE_SIDE = 80
OBJECT_SIDE = (0.30, 0.42)
"""Longer side of the object as a share of the image's."""
MAX_ROTATION = 12  # degrees

PICTOGRAPHS = {
    "airplane": "\u2708",
    "anchor": "\u2693",
    "arrow": "\u2794",
    "cat": "\U0001f431",
    "cloud": "\u2601",
    "clover": "\u2618",
    "crown": "\u265b",
    "dice": "\u2684",
    "envelope": "\u2709",
    "flag": "\u2691",
    "flower": "\u273f",
    "gear": "\u2699",
    "hammer": "\u2692",
    "heart": "\u2665",
    "horse": "\u265e",
    "monkey": "\U0001f435",
    "music note": "\u266b",
    "skull": "\u2620",
    "snowflake": "\u2744",
    "star": "\u2605",
    "sun": "\u2600",
    "telephone": "\u260e",
    "tower": "\u265c",
    "umbrella": "\u2602",
}
CLASSES = tuple(PICTOGRAPHS)
COLORS = {
    "red": (222, 35, 35),
    "orange": (250, 135, 15),
    "yellow": (250, 222, 40),
    "green": (35, 165, 60),
    "blue": (35, 80, 225),
    "purple": (140, 45, 190),
    "pink": (250, 120, 185),
    "white": (250, 250, 250),
}
TYPICAL_SHARE = 0.8
"""Share of the scenes of a class that show it in one of its two typical colours. A class that has
any colour is a shape alone, which small towers hardly learn in the minutes that the demo takes."""
BACKGROUNDS = ("striped", "dotted", "checkered", "cloudy", "grainy", "wavy")
CAPTIONS = (
    "a photo of {a_color_object} on {a_background} background",
    "a photo of {an_object}",
    "a picture of {an_object}",
    "a picture of {a_color_object}",
    "{an_object}",
)
"""A validation scene has the first caption, a training scene three different ones. Few captions
name the background or the colour: both are learned long before the object is, and captions that
differ in them alone would teach nothing else in the minutes that the demo takes."""


@dataclass(frozen=True)
class Scene:
    image: Image.Image
    mask: Image.Image
    """The object's pixels, in mode 1."""
    box: tuple[int, int, int, int]
    """(top, left, height, width) of the mask, in pixels."""


def draw_scene(rng: np.random.Generator, name: str, color: str, background: str) -> Scene:
    """Draws one object of a class and colour on a background with distracting blobs."""
    canvas = Image.fromarray(_draw_texture(rng, background))
    _draw_blobs(rng, canvas)
    alpha = _draw_object(rng, name)
    whole = Image.new("L", canvas.size)
    whole.paste(alpha, tuple(int(rng.integers(1, IMAGE_SIDE - side)) for side in alpha.size))
    # A dark rim keeps the object apart from a background of its own colour.
    canvas.paste((25, 25, 25), mask=whole.filter(ImageFilter.MaxFilter(3)))
    canvas.paste(COLORS[color], mask=whole)
    mask = whole.point(lambda value: 255 * (value > 127)).convert("1", dither=Image.Dither.NONE)
    left, top, right, bottom = mask.getbbox()
    return Scene(canvas, mask, (top, left, bottom - top, right - left))


def typical_colors(name: str) -> tuple[str, str]:
    """The two colours that most scenes of a class show; no other class has the same two."""
    colors, index = list(COLORS), CLASSES.index(name)
    first, step = index % len(colors), 1 + index // len(colors)
    return colors[first], colors[(first + step) % len(colors)]


def draw_color(rng: np.random.Generator, name: str) -> str:
    """A colour for a scene of a class."""
    is_typical = rng.random() < TYPICAL_SHARE
    return str(rng.choice(typical_colors(name) if is_typical else list(COLORS)))


def make_caption(template: str, name: str, color: str, background: str) -> str:
    return template.format(
        a_color_object=_with_article(f"{color} {name}"),
        a_background=_with_article(background),
        an_object=_with_article(name),
    )


def _with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _draw_texture(rng: np.random.Generator, background: str) -> np.ndarray:
    """(80, 80, 3) uint8: two muted colours mixed by a pattern, with a gradient of light."""
    y, x = np.mgrid[:IMAGE_SIDE, :IMAGE_SIDE].astype(np.float32)
    angle, phase = rng.uniform(0, np.pi), rng.uniform(0, 2 * np.pi)
    period = rng.uniform(7, 14)
    along = x * np.cos(angle) + y * np.sin(angle)
    across = y * np.cos(angle) - x * np.sin(angle)
    waves = 2 * np.pi / period
    if background == "striped":
        pattern = np.sin(along * waves + phase) > 0
    elif background == "dotted":
        pattern = np.cos(along * waves + phase) + np.cos(across * waves) > 0.9
    elif background == "checkered":
        pattern = np.sin(along * waves / 1.4 + phase) * np.sin(across * waves / 1.4) > 0
    elif background == "wavy":
        pattern = np.sin(along * waves + 2 * np.sin(across * waves / 2 + phase)) * 0.5 + 0.5
    elif background == "cloudy":
        pattern = _smooth_noise(rng, 5)
    else:
        pattern = rng.random(x.shape)
    pattern = pattern.astype(np.float32)[..., None]
    color, contrast = rng.uniform(60, 200, 3), rng.uniform(-20, 70, 3)
    muted = color.mean() + 0.35 * (color - color.mean())
    light = 1 + 0.15 * np.sin(x / IMAGE_SIDE * np.pi + phase)[..., None]
    noise = rng.normal(0, 5, (*x.shape, 1))
    return ((muted + pattern * contrast) * light + noise).clip(0, 255).astype(np.uint8)


def _smooth_noise(rng: np.random.Generator, cells: int) -> np.ndarray:
    coarse = Image.fromarray(rng.random((cells, cells)).astype(np.float32))
    return np.asarray(coarse.resize((IMAGE_SIDE, IMAGE_SIDE), Image.Resampling.BICUBIC))


def _draw_blobs(rng: np.random.Generator, canvas: Image.Image) -> None:
    draw = ImageDraw.Draw(canvas, "RGBA")
    palette = list(COLORS.values())
    for _ in range(rng.integers(3, 7)):
        x, y = rng.uniform(0, IMAGE_SIDE, 2)
        radius = rng.uniform(3, 8)
        corners = rng.integers(4, 9)
        angles = np.sort(rng.uniform(0, 2 * np.pi, corners))
        lengths = radius * rng.uniform(0.6, 1.4, corners)
        outline = [
            (x + length * np.cos(angle), y + length * np.sin(angle))
            for angle, length in zip(angles, lengths, strict=True)
        ]
        color = palette[rng.integers(len(palette))]
        draw.polygon(outline, fill=(*color, int(rng.integers(120, 220))))


def _draw_object(rng: np.random.Generator, name: str) -> Image.Image:
    """The object's coverage in mode L, cut to the object's edges."""
    glyph = _render_glyph(name).rotate(
        rng.uniform(-MAX_ROTATION, MAX_ROTATION), Image.Resampling.BICUBIC, expand=True
    )
    glyph = glyph.crop(glyph.getbbox())
    scale = IMAGE_SIDE * rng.uniform(*OBJECT_SIDE) / max(glyph.size)
    size = tuple(max(1, round(side * scale)) for side in glyph.size)
    return glyph.resize(size, Image.Resampling.BOX)


@cache
def _render_glyph(name: str) -> Image.Image:
    import matplotlib  # here, because only writing the data needs it

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    image = Image.new("L", (240, 240))
    font = ImageFont.truetype(str(path), 140)
    ImageDraw.Draw(image).text((120, 120), PICTOGRAPHS[name], fill=255, font=font, anchor="mm")
    return image.crop(image.getbbox())
