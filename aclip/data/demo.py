"""Built-in captioned scenes: a small object on a cluttered background, made on first use as shards.

The object's box and mask are known, so that the quality of a token selection can be measured.
Objects are pictographs of DejaVu Sans, the font that matplotlib ships.
"""

import hashlib
import io
import json
import multiprocessing
import os
import shutil
import tarfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
from filelock import FileLock
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from aclip.data.shards.counts import SIZES_FILE
from aclip.distributed import say
from aclip.errors import ConfigError
from aclip.files import cache_folder

IMAGE_SIDE = 80
OBJECT_SIDE = (0.30, 0.42)
"""Longer side of the object as a share of the image's."""
MAX_ROTATION = 12  # degrees
TRAIN_SHARDS, TRAIN_SHARD_SIZE = 48, 160
VAL_PER_CLASS = 40
VAL_SHARD = TRAIN_SHARDS  # its number, and its seed like every other shard's
MAX_PROCESSES = 4

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
BACKGROUNDS = ("striped", "dotted", "checkered", "cloudy", "grainy", "wavy")
CAPTIONS = (
    "a photo of {a_color_object} on {a_background} background",
    "a photo of {an_object}",
    "a picture of {an_object}",
    "a picture of {a_color_object}",
    "{a_color_object}",
)
"""The first is the caption of a validation scene; a training scene has three different ones. Few
name the background and not all the colour: both are learned long before the object is, and captions
that can be told apart by them alone teach nothing else in the minutes that the demo takes."""
PROMPTS = ("a photo of a {c}", "a picture of a {c}", "a {c}", "the {c}")


@dataclass(frozen=True)
class DemoData:
    train: list[str]
    val: list[str]
    folder: Path
    """Also holds classnames.txt and zeroshot_classification_templates.txt."""


@dataclass(frozen=True)
class Scene:
    image: Image.Image
    mask: Image.Image
    """Mode 1, the object's pixels."""
    box: tuple[int, int, int, int]
    """(top, left, height, width) of the mask, pixels."""


def ensure_demo_data() -> DemoData:
    """Gives the demo data, after writing it into the cache folder if it is not there.

    Any number of processes may call it at once: one writes, the others wait. The folder appears
    whole or not at all, and its name changes with this file.

    Raises:
        ConfigError: the cache folder can't be written.
    """
    version = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:10]
    folder = cache_folder() / f"demo-{version}"
    if not folder.is_dir():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(folder.with_suffix(".lock")):
                if not folder.is_dir():
                    say(f"writing the demo data to {folder}, once")
                    _write_folder(folder)
        except OSError as error:
            raise ConfigError(
                f"the demo data can't be written to {folder} ({error.strerror or error}); set "
                "ACLIP_CACHE to a folder that can be written"
            ) from None
    train = [str(folder / _shard_name(shard)) for shard in range(TRAIN_SHARDS)]
    return DemoData(train, [str(folder / _shard_name(VAL_SHARD))], folder)


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


def make_caption(template: str, name: str, color: str, background: str) -> str:
    return template.format(
        a_color_object=_with_article(f"{color} {name}"),
        a_background=_with_article(background),
        an_object=_with_article(name),
    )


def _write_folder(folder: Path) -> None:
    # One fixed name, so that what a killed process left is replaced; the lock is held.
    temporary = folder.with_suffix(".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    shards = range(VAL_SHARD, -1, -1)  # the largest first
    processes = min(MAX_PROCESSES, len(os.sched_getaffinity(0)))
    # fork, because the other ways run the launch script's imports again in each process.
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        sizes = dict(zip(shards, pool.map(partial(_write_shard, temporary), shards), strict=True))
    shard_list = [{"url": _shard_name(shard), "nsamples": sizes[shard]} for shard in sorted(sizes)]
    (temporary / SIZES_FILE).write_text(json.dumps({"shardlist": shard_list}, indent=1))
    (temporary / "classnames.txt").write_text("\n".join(CLASSES) + "\n")
    prompts = "\n".join(PROMPTS) + "\n"
    (temporary / "zeroshot_classification_templates.txt").write_text(prompts)
    os.replace(temporary, folder)


def _write_shard(folder: Path, shard: int) -> int:
    """Writes one shard and returns its number of samples."""
    rng = np.random.default_rng([1, shard])
    is_val = shard == VAL_SHARD
    contents = _val_contents(rng) if is_val else _train_contents(rng)
    with tarfile.open(folder / _shard_name(shard), "w", format=tarfile.USTAR_FORMAT) as archive:
        for index, (name, color, background) in enumerate(contents):
            scene = draw_scene(rng, name, color, background)
            templates = CAPTIONS[:1] if is_val else rng.permutation(CAPTIONS)[:3]
            captions = [make_caption(text, name, color, background) for text in templates]
            facts = {"captions": captions, "class": name, "color": color, "box": scene.box}
            members = {
                "jpg": _encode(scene.image, "JPEG", quality=90),
                "txt": captions[0].encode(),
                "json": json.dumps(facts | {"background": background}).encode(),
                "mask.png": _encode(scene.mask, "PNG"),
                "cls": str(CLASSES.index(name)).encode(),
            }
            for suffix, content in members.items():
                member = tarfile.TarInfo(f"{shard:02d}{index:04d}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return len(contents)


def _train_contents(rng: np.random.Generator) -> list[tuple[str, str, str]]:
    return [
        (str(rng.choice(CLASSES)), str(rng.choice(list(COLORS))), str(rng.choice(BACKGROUNDS)))
        for _ in range(TRAIN_SHARD_SIZE)
    ]


def _val_contents(rng: np.random.Generator) -> list[tuple[str, str, str]]:
    """As many of each class, and no content twice, so that every caption fits one scene only."""
    looks = [(color, background) for color in COLORS for background in BACKGROUNDS]
    contents = [
        (name, *looks[index])
        for name in CLASSES
        for index in rng.permutation(len(looks))[:VAL_PER_CLASS]
    ]
    return [contents[index] for index in rng.permutation(len(contents))]


def _shard_name(shard: int) -> str:
    return "val.tar" if shard == VAL_SHARD else f"train-{shard:02d}.tar"


def _encode(image: Image.Image, image_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


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
    """The object's coverage, mode L, cut to its edges."""
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
