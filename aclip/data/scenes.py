"""Draws scenes: a small object on a cluttered background, and in some of them smaller objects of
other classes beside it. The box and the mask of each object are known.

Objects are pictographs of DejaVu Sans, the font that matplotlib ships. A change of the drawing
needs a new VERSION in demo.py. scene_captions.py writes what the captions say.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

IMAGE_SIDE = 80
OBJECT_SIDE = (0.30, 0.42)
"""Longer side of the object as a share of the image's."""
OTHER_SIDE = (0.18, 0.26)
"""The same of the objects beside it."""
OTHERS_SHARE = 0.2
"""Share of the scenes with one or two other objects, which no caption names."""
MAX_ROTATION = 12  # degrees

PICTOGRAPHS = {
    "airplane": "\u2708",
    "anchor": "\u2693",
    "arrow": "\u2794\u2798\u279a\u279c\u27a1\u27a4",
    "cat": "\U0001f431\U0001f638\U0001f63b\U0001f63c\U0001f63e\U0001f640",
    "cloud": "\u2601",
    "clover": "\u2618",
    "crown": "\u265b",
    "dice": "\u2680\u2681\u2682\u2683\u2684\u2685",
    "envelope": "\u2709",
    "flag": "\u2691\u2690",
    "flower": "\u273f\u2740\u2741\u273e\u273d",
    "gear": "\u2699",
    "hammer": "\u2692",
    "heart": "\u2665\u2661\u2764\u2765\u2763",
    "horse": "\u265e",
    "monkey": "\U0001f435",
    "music note": "\u266b\u266a\u266c",
    "skull": "\u2620",
    "snowflake": "\u2744\u2745\u2746",
    "star": "\u2605\u2606\u272a\u272f\u2729\u2730",
    "sun": "\u2600\u263c",
    "telephone": "\u260e\u260f\u2706",
    "tower": "\u265c",
    "umbrella": "\u2602\u2614",
}
"""The looks of each class: the pictographs of which a scene shows one."""
CLASSES = tuple(PICTOGRAPHS)
COLORS = {
    "red": (222, 35, 35),
    "orange": (250, 135, 15),
    "yellow": (250, 222, 40),
    "lime": (150, 225, 40),
    "green": (35, 165, 60),
    "turquoise": (50, 205, 200),
    "blue": (35, 80, 225),
    "purple": (140, 45, 190),
    "pink": (250, 120, 185),
    "brown": (130, 75, 35),
    "white": (250, 250, 250),
    "black": (20, 20, 20),
}
TYPICAL_SHARE = 0.8
"""Share of the scenes of a class that show it in one of its two typical colours. A class that has
any colour is a shape alone, which small towers hardly learn in the minutes that the demo takes."""
BACKGROUNDS = ("striped", "dotted", "checkered", "cloudy", "grainy", "wavy")
TRIES = 8
"""How often another object is drawn anew until it touches none; after that the scene has one less,
so that OTHERS_SHARE is an upper bound."""
SHOWN = 84
"""A pixel is the object's from a third of 255 on; with a half, thin outlines would have no mask."""


@dataclass(frozen=True)
class SceneObject:
    name: str
    """Its class."""
    color: str
    box: tuple[int, int, int, int]
    """(top, left, height, width) of the mask, in pixels."""
    mask: Image.Image
    """The object's pixels, in mode 1."""


@dataclass(frozen=True)
class Scene:
    image: Image.Image
    objects: tuple[SceneObject, ...]
    """The first is the one that captions name; none covers another."""


def draw_scene(rng: np.random.Generator, name: str, color: str, background: str) -> Scene:
    """Draws an object of a class and colour on a background with distracting blobs, and smaller
    objects of other classes in OTHERS_SHARE of the scenes."""
    canvas = Image.fromarray(_draw_texture(rng, background))
    _draw_blobs(rng, canvas)
    objects = [_place_object(rng, canvas, name, color, OBJECT_SIDE)]
    others = int(rng.integers(1, 3)) if rng.random() < OTHERS_SHARE else 0
    for other in rng.choice([each for each in CLASSES if each != name], others, replace=False):
        other_color = draw_color(rng, str(other))
        for _ in range(TRIES):
            placed = _place_object(rng, canvas, str(other), other_color, OTHER_SIDE, objects)
            if placed is not None:
                objects.append(placed)
                break
    return Scene(canvas, tuple(objects))


def typical_colors(name: str) -> tuple[str, str]:
    """The two colours that most scenes of a class show; no other class has the same two."""
    colors, index = list(COLORS), CLASSES.index(name)
    first, step = index % len(colors), 1 + index // len(colors)
    return colors[first], colors[(first + step) % len(colors)]


def draw_color(rng: np.random.Generator, name: str) -> str:
    """A colour for an object of a class."""
    is_typical = rng.random() < TYPICAL_SHARE
    return str(rng.choice(typical_colors(name) if is_typical else list(COLORS)))


def _place_object(
    rng: np.random.Generator,
    canvas: Image.Image,
    name: str,
    color: str,
    side: tuple[float, float],
    others: Sequence[SceneObject] = (),
) -> SceneObject | None:
    """Draws an object into the canvas at a random place. Returns None, and draws nothing, where it
    would touch one of `others`."""
    alpha = _draw_object(rng, name, side)
    whole = Image.new("L", canvas.size)
    whole.paste(alpha, tuple(int(rng.integers(1, IMAGE_SIDE - each)) for each in alpha.size))
    # A rim keeps the object apart from a background of its own colour.
    rim = whole.filter(ImageFilter.MaxFilter(3))
    for other in others:
        if ImageChops.multiply(
            rim, other.mask.convert("L").filter(ImageFilter.MaxFilter(3))
        ).getbbox():
            return None
    canvas.paste((225, 225, 225) if color == "black" else (25, 25, 25), mask=rim)
    canvas.paste(COLORS[color], mask=whole)
    mask = whole.point(lambda value: 255 * (value > SHOWN)).convert("1", dither=Image.Dither.NONE)
    left, top, right, bottom = mask.getbbox()
    return SceneObject(name, color, (top, left, bottom - top, right - left), mask)


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


def _draw_object(rng: np.random.Generator, name: str, side: tuple[float, float]) -> Image.Image:
    """The coverage of an object of one of the class's looks, in mode L, cut to its edges."""
    glyph = _render_glyph(str(rng.choice(list(PICTOGRAPHS[name])))).rotate(
        rng.uniform(-MAX_ROTATION, MAX_ROTATION), Image.Resampling.BICUBIC, expand=True
    )
    glyph = glyph.crop(glyph.getbbox())
    scale = IMAGE_SIDE * rng.uniform(*side) / max(glyph.size)
    size = tuple(max(1, round(each * scale)) for each in glyph.size)
    return glyph.resize(size, Image.Resampling.BOX)


@cache
def _render_glyph(pictograph: str) -> Image.Image:
    import matplotlib  # here, because only writing the data needs it

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    image = Image.new("L", (240, 240))
    font = ImageFont.truetype(str(path), 140)
    ImageDraw.Draw(image).text((120, 120), pictograph, fill=255, font=font, anchor="mm")
    return image.crop(image.getbbox())
