"""The figure of a checkpoint, as files and as a page."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from aclip.config.recipe import Recipe
from aclip.data.captions import captions_beside
from aclip.data.demo import ensure_demo_data
from aclip.data.images.augment import augment
from aclip.data.images.suffixes import IMAGE_SUFFIXES, is_litter
from aclip.data.shards.listing import Skip, list_shards, remote_shards
from aclip.data.shards.remote import is_remote
from aclip.data.shards.tar import RawSample, TarShard
from aclip.distributed import limit_threads
from aclip.errors import ConfigError
from aclip.files import write_whole, writing
from aclip.method.masks.attentive import ATTENTIVE
from aclip.method.masks.policies import POLICIES
from aclip.reports.document import (
    Block,
    Gallery,
    Heading,
    Picture,
    Table,
    Text,
    to_html,
    to_markdown,
)
from aclip.reports.kept_patches import (
    PictureSet,
    kept_object_patches,
    kept_object_share,
    loose_sample,
    read_picture_set,
)
from aclip.reports.mask_pictures import MAX_SAMPLES, Column, draw_figure, encode
from aclip.weights.checkpoint_weights import CheckpointWeights, load_checkpoint_weights

NUM_MEASURED = 256
"""Samples that the overlap with the objects is measured on; their masks must be known."""
BATCH_SIZE = 8
PAGE, FIGURE, SAMPLE = "figure.html", "figure.png", "sample-{}.png"


def write_figure(checkpoint: str, images: list[str], out: Path) -> None:
    """Draws what a checkpoint attends to and keeps.

    Args:
        checkpoint: see find_checkpoint.
        images: image files, folders of them, or shards; the run's validation set if there are none.
        out: an existing folder.

    Raises:
        ConfigError: a damaged checkpoint, or nothing usable in the images.
        NotWritten: `out` can't be written.
    """
    limit_threads()
    weights = load_checkpoint_weights(checkpoint, None)
    samples = _raw_samples(images, weights.recipe)
    pictured = read_picture_set(weights.recipe, samples, NUM_MEASURED)
    if pictured is None:
        where = " ".join(images) or "data.val of the run"
        raise ConfigError(f"IMAGES is {where}, which holds no usable image; give others")
    if len(pictured.captions) > MAX_SAMPLES:
        print(f"measuring the masks on {len(pictured.captions)} images with objects", flush=True)
    scores = attention(weights, pictured.images)
    policy = weights.recipe.mask_policy
    shown = policy.name if policy.reads_teacher else ATTENTIVE.name
    if scores is None:
        shown = "random" if policy.name == "none" else policy.name
    drawn = (
        name
        for name, each in POLICIES.items()
        if name != "none" and not (scores is None and each.reads_teacher)
    )
    keep_ids = {name: pictured.keep_ids(name, scores) for name in drawn}
    columns = pictured.columns(shown, scores, weights.model)
    overlap = _overlap(pictured, keep_ids)
    first_view = 1 if scores is None else 2  # the views come after image and attention
    rows = _rows(pictured, columns, keep_ids[shown], first_view)
    blocks = [*_explanation(weights), *overlap, *rows]
    page = to_html(f"Kept patches of {weights.folder}", blocks)
    for number in range(MAX_SAMPLES):
        with writing(out / SAMPLE):
            (out / SAMPLE.format(number + 1)).unlink(missing_ok=True)  # of an earlier figure
    for number, caption in enumerate(pictured.captions[:MAX_SAMPLES]):
        row = [replace(column, pictures=[column.pictures[number]]) for column in columns]
        write_whole(out / SAMPLE.format(number + 1), encode(draw_figure(row, [caption])))
    write_whole(out / FIGURE, encode(draw_figure(columns, pictured.captions)))
    write_whole(out / PAGE, page)
    for kind, number in sorted(pictured.skipped.items()):
        print(f"skipped {number}: {kind}")
    print(to_markdown("Object's patches kept", overlap) if overlap else "", end="")
    print(f"wrote {out / PAGE}, {FIGURE} and a PNG of each sample", flush=True)


@torch.inference_mode()
def attention(weights: CheckpointWeights, images: Tensor) -> Tensor | None:
    """What the image tower of a checkpoint attends to: (n, 3, T, T) uint8 -> (n, g, g) fp32; None
    for a tower without a query whose attention it could be."""
    tower = weights.student.image.eval()
    if not tower.has_scores:
        return None
    prefix = "image."
    state = {n.removeprefix(prefix): t for n, t in weights.state.items() if n.startswith(prefix)}
    tower.assign(state)
    scores, score_layers = [], _score_layers(weights.recipe)
    for chunk in images.split(BATCH_SIZE):
        pixels = augment(chunk, None, weights.recipe.augment, torch.float32)
        scores.append(tower.forward_with_scores(pixels, score_layers, with_features=False)[1])
    return torch.cat(scores)


def _score_layers(recipe: Recipe) -> int | None:
    return None if recipe.teacher is None else recipe.teacher.score_layers


def _raw_samples(paths: list[str], recipe: Recipe) -> Iterator[RawSample | Skip]:
    """The samples of shards and image files in the order given; without any, of the run."""
    if not paths:
        if recipe.data.val:
            yield from _of_shards(list_shards(recipe.data.val, "data.val"), recipe)
            return
        if recipe.data.train != "demo":
            print("the run has no validation set: its figure is of the built-in scenes")
        paths = ensure_demo_data().val
    for entry in paths:
        path = Path(entry)
        if entry.endswith(".tar") or is_remote(entry):
            yield from _of_shards(list_shards(entry, "IMAGES"), recipe)
        elif path.is_dir():
            files = [p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES]
            yield from (_of_file(p) for p in sorted(files) if not is_litter(p.name))
        else:
            yield _of_file(path)


def _of_shards(urls: list[str], recipe: Recipe) -> Iterator[RawSample | Skip]:
    # Not through an index, which would count the samples of every shard for the first eight.
    for url in urls:
        remote = remote_shards(recipe.data) if is_remote(url) else None
        for sample in TarShard(url, remote).walk():
            yield sample if sample.is_complete else Skip("truncated_shard")


def _of_file(path: Path) -> RawSample:
    """An image file; its captions lie beside it as .txt or .json, or its name is one."""
    try:
        image = path.read_bytes()
        captions = captions_beside(path)
    except OSError as error:
        raise ConfigError(
            f"IMAGES is {path}, which can't be read ({error.strerror}); give image files, folders "
            "of them, or .tar shards"
        ) from None
    if isinstance(captions, Skip):
        captions = [os.fsencode(path.stem).decode(errors="replace")]
    return loose_sample(path.name, image, "\n".join(" ".join(text.split()) for text in captions))


def _explanation(weights: CheckpointWeights) -> list[Block]:
    score_layers = _score_layers(weights.recipe)
    layers = "layers" if score_layers is None else f"layers 1 to {score_layers}"
    image = weights.student.image
    lines = [weights.recipe.description]
    if not image.has_scores:
        lines.append(
            f"The {weights.model} pools by {image.pooling}: no query attends to the patches, so "
            "there is no heat map. Grey patches are dropped."
        )
    elif image.pooling == "map":
        lines.append(
            f"The heat map is the attention of the {weights.model}'s pooling query to each patch "
            "of the image, mean over heads; grey patches are dropped."
        )
    else:
        lines.append(
            f"The heat map is the attention of the {weights.model}'s CLS token to each patch of "
            f"the image, mean over heads and {layers}; grey patches are dropped."
        )
    if weights.model == "student" and image.has_scores:
        lines.append("This run has no teacher, so the attention is the student's.")
    mask = weights.recipe.mask
    lines.append(weights.recipe.mask_policy.explanation)
    if mask.warmup:
        lines.append(
            f"Noise takes part in the mask in the first {100 * mask.warmup:g} % of the run; shown "
            "is what the mask keeps after that."
        )
    if mask.temperature:
        lines.append(
            f"Blocks are drawn by score with temperature {mask.temperature:g}; shown is one draw."
        )
    return [Text(line) for line in lines if line]


def _overlap(pictured: PictureSet, keep_ids: dict[str, Tensor]) -> list[Block]:
    """How much of the objects each mask keeps, on all samples read; nothing where none is known."""
    counts = {name: kept_object_patches(ids, pictured.coverage) for name, ids in keep_ids.items()}
    _, totals = counts["random"]
    shows_object = totals > 0
    if not shows_object.any():
        return []
    shares = {name: kept_object_share(*pair) for name, pair in counts.items()}
    rows = [(name, f"{100 * share:.1f} %") for name, share in shares.items()]
    patches = f"{keep_ids['random'].shape[-1]} of {pictured.coverage.shape[-1] ** 2} patches"
    text = (
        f"Each mask keeps {patches}. The shares are means over the {int(shows_object.sum())} views "
        f"of {len(totals)} images that show the object; a patch is the object's when the object "
        "covers a quarter of it."
    )
    return [Table(("Mask", "object's patches kept"), rows), Text(text)]


def _rows(
    pictured: PictureSet, columns: list[Column], keep_ids: Tensor, first_view: int
) -> list[Block]:
    """The first eight samples: a caption and its pictures each.

    Args:
        first_view: which column is that of the first student view.
    """
    kept, totals = kept_object_patches(keep_ids, pictured.coverage)
    blocks: list[Block] = []
    for number, caption in enumerate(pictured.captions[:MAX_SAMPLES]):
        labels = [f"{column.title}: {column.subtitle}" for column in columns]
        for view, total in enumerate(totals[number].tolist()):
            if total:
                labels[first_view + view] += f", {kept[number, view]} of the object's {total}"
        pictures = [
            Picture(label, encode(column.pictures[number]))
            for label, column in zip(labels, columns, strict=True)
        ]
        blocks += [Heading(caption), Gallery(pictures, 160)]
    return blocks
