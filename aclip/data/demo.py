"""Built-in captioned scenes: a small object on a cluttered background, made on first use as shards.

The boxes and masks of all objects are known, so that the quality of a token selection can be
measured. scenes.py draws the scenes, and scene_captions.py captions them.
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
from functools import partial
from pathlib import Path

import numpy as np
from filelock import FileLock
from PIL import Image

from aclip.data.progress import progress_bar
from aclip.data.scene_captions import (
    CAPTIONS,
    FILLED_SHARE,
    LEADS,
    TAILS,
    VALIDATION_CAPTION,
    draw_captions,
    make_caption,
)
from aclip.data.scenes import (
    BACKGROUNDS,
    CLASSES,
    COLORS,
    IMAGE_SIDE,
    MAX_ROTATION,
    OBJECT_SIDE,
    OTHER_SIDE,
    OTHERS_SHARE,
    PICTOGRAPHS,
    TYPICAL_SHARE,
    Scene,
    draw_color,
    draw_scene,
)
from aclip.data.shards.counts import SIZES_FILE
from aclip.distributed import say
from aclip.errors import ConfigError
from aclip.files import cache_folder
from aclip.machine import usable_cores

VERSION = 3
"""Raise it with every change of the code here, in scenes.py or in scene_captions.py that changes a
picture, a caption or a file, or the old ones stay in use. A change of a constant in _folder_name
needs no new version."""
TRAIN_SHARDS, TRAIN_SHARD_SIZE = 100, 512
VAL_SIZE = 2000
CAPTIONS_PER_SCENE = 3
VAL_SHARD = TRAIN_SHARDS  # a shard's number is its seed
MAX_PROCESSES = 8
PROMPTS = ("a photo of a {c}", "a picture of a {c}", "a {c}", "the {c}")
JPEG_QUALITY = 90


@dataclass(frozen=True)
class DemoData:
    train: list[str]
    val: list[str]
    folder: Path
    """Holds the shards, classnames.txt and zeroshot_classification_templates.txt."""


def ensure_demo_data() -> DemoData:
    """Gives the demo data, after writing it into the cache folder if it is not there.

    Any number of processes may call it at once: one writes, the others wait. The folder appears
    whole or not at all, and its name changes with VERSION and the constants that shape the data.

    Raises:
        ConfigError: the cache folder can't be written.
    """
    folder = cache_folder() / _folder_name()
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


def _folder_name() -> str:
    """The data's version, and a hash of the constants that shape them."""
    parameters = {
        "image": (IMAGE_SIDE, JPEG_QUALITY),
        "objects": (OBJECT_SIDE, OTHER_SIDE, OTHERS_SHARE, MAX_ROTATION),
        "sizes": (TRAIN_SHARDS, TRAIN_SHARD_SIZE, VAL_SIZE, VAL_SHARD, CAPTIONS_PER_SCENE),
        "contents": (list(PICTOGRAPHS.items()), list(COLORS.items()), TYPICAL_SHARE, BACKGROUNDS),
        "texts": (VALIDATION_CAPTION, CAPTIONS, FILLED_SHARE, LEADS, TAILS, PROMPTS),
    }
    digest = hashlib.sha256(json.dumps(parameters).encode()).hexdigest()
    return f"demo-{VERSION}-{digest[:8]}"


def _write_folder(folder: Path) -> None:
    # One fixed name, so that what a killed process left is replaced; the caller holds the lock.
    temporary = folder.with_suffix(".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    shards = range(VAL_SHARD, -1, -1)  # the largest first
    processes = min(MAX_PROCESSES, usable_cores())
    # fork, because the other ways run the launch script's imports again in each process.
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        written = pool.map(partial(_write_shard, temporary), shards)
        bar = progress_bar(written, desc="demo data", unit=" shards", total=len(shards))
        sizes = dict(zip(shards, bar, strict=True))
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
    names = _val_classes(rng) if is_val else rng.choice(CLASSES, TRAIN_SHARD_SIZE)
    with tarfile.open(folder / _shard_name(shard), "w", format=tarfile.USTAR_FORMAT) as archive:
        for index, name in enumerate(names):
            content = str(name), draw_color(rng, str(name)), str(rng.choice(BACKGROUNDS))
            scene = draw_scene(rng, *content)
            if is_val:
                captions = [make_caption(VALIDATION_CAPTION, *content)]
            else:
                captions = draw_captions(rng, *content, CAPTIONS_PER_SCENE)
            for suffix, data in _members(scene, captions, content[-1]).items():
                member = tarfile.TarInfo(f"{shard:03d}{index:04d}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return len(names)


def _members(scene: Scene, captions: list[str], background: str) -> dict[str, bytes]:
    """The files of a sample, by suffix; mask.png is the named object's, and instances.png has the
    number of an object, from 1 on, at its pixels."""
    named = scene.objects[0]
    objects = [{"class": each.name, "color": each.color, "box": each.box} for each in scene.objects]
    facts = {"captions": captions, "background": background, "objects": objects}
    members = {
        "jpg": _encode(scene.image, "JPEG", quality=JPEG_QUALITY),
        "txt": captions[0].encode(),
        "json": json.dumps(facts).encode(),
        "mask.png": _encode(named.mask, "PNG"),
        "cls": str(CLASSES.index(named.name)).encode(),
    }
    if len(scene.objects) > 1:
        instances = Image.new("L", scene.image.size)
        for number, each in enumerate(scene.objects, 1):
            instances.paste(number, mask=each.mask)
        members["instances.png"] = _encode(instances, "PNG")
    return members


def _val_classes(rng: np.random.Generator) -> np.ndarray:
    """Each class equally often, or once more than others. Scenes may have the same caption, so that
    retrieval among them can't be perfect."""
    return rng.permutation([CLASSES[index % len(CLASSES)] for index in range(VAL_SIZE)])


def _shard_name(shard: int) -> str:
    return "val.tar" if shard == VAL_SHARD else f"train-{shard:02d}.tar"


def _encode(image: Image.Image, image_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()
