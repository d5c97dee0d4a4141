"""Evaluates pairs of towers on one set, all ranks together: retrieval and zero-shot.

Used during training and by launch/evaluate.py. The metrics are in metrics/.
"""

from collections import Counter
from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor

from aclip import distributed
from aclip.data.captions import NOTE_KINDS
from aclip.errors import ConfigError
from aclip.evaluation.metrics import zero_shot
from aclip.evaluation.metrics.retrieval import retrieval_recall
from aclip.evaluation.sets.evaluation_set import (
    NO_LABEL,
    EvaluationSet,
    ValidationBatch,
    read_validation,
)
from aclip.evaluation.sets.prompts import CLASS_NAMES_FILE, ClassPrompts
from aclip.evaluation.skips import SKIPPED, show_kinds
from aclip.evaluation.texts import embed_captions, embed_classes
from aclip.evaluation.together import count_together, raise_together
from aclip.evaluation.towers import Progress, Towers, image_embedder

CAPTIONS_PER_IMAGE = 2**20
"""More captions than any image has."""


def check_scored(metrics: dict[str, float], field: str, where: str) -> None:
    """Refuses what `evaluate_set` can count but not score.

    Args:
        field: the option or the recipe's key that gave the set.
        where: the set, in words.

    Raises:
        ConfigError: there is no score.
    """
    if not any(name.startswith(("zero_shot", "image_to_text")) for name in metrics):
        raise ConfigError(
            f"{field} is {where}, whose {metrics['num_images']:,.0f} usable samples hold neither "
            f"captions nor labels with names; write {CLASS_NAMES_FILE} beside the shards or one "
            "folder up"
        )


def evaluate_set(
    towers: Towers,
    dataset: EvaluationSet,
    prompts: ClassPrompts | None,
    batch_size: int,
    embed: Callable[..., Tensor] = embed_classes,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Scores one pair of towers; see evaluate_models."""
    return evaluate_models({"": towers}, dataset, prompts, batch_size, embed, progress)[""]


@torch.no_grad()
def evaluate_models(
    models: dict[str, Towers],
    dataset: EvaluationSet,
    prompts: ClassPrompts | None,
    batch_size: int,
    embed: Callable[..., Tensor] = embed_classes,
    progress: Progress | None = None,
) -> dict[str, dict[str, float]]:
    """Computes what the set allows: retrieval with captions, zero-shot with labels and prompts.

    Every sample counts once, whatever the number of ranks, is decoded once, whatever the number of
    models, and every rank calls each encoder equally often. All ranks return the same. Embeddings
    stay in memory for images with captions, each model's; an image with a label alone leaves its
    rank and its label.

    Args:
        models: the towers by name, of one resolution and resample.
        dataset: the set.
        prompts: the prompts of its classes; None for no zero-shot.
        batch_size: images or texts of one call on one rank.
        embed: embeds the classes, with the arguments of `embed_classes`.
        progress: hears from time to time what is done.

    Returns:
        For each model image_to_text_r{1,5,10} and text_to_image_r{1,5,10}, zero_shot_top{1,5},
        zero_shot_mean_per_class, with two classes zero_shot_roc_auc unless only one of them has
        images: shares in [0, 1]; and counts: num_images, num_skipped and num_skipped_KIND, with
        captions num_captions, with classes num_classes, and num_ and a kind of NOTE_KINDS where
        there are such samples.

    Raises:
        ConfigError: no sample can be used, or a label has no class.
        DataError: the set can't be read to its end.
    """
    rank, world_size = distributed.rank(), distributed.world_size()
    mine = len(range(rank, dataset.num_samples, world_size))
    held, to_embeds = {}, {}
    for name, towers in models.items():
        class_embeds = None
        if prompts is not None:
            class_embeds = embed(towers, batch_size, prompts, progress)
        held[name], to_embeds[name] = _Images(class_embeds, mine), image_embedder(towers)
    size, resample = _what_all_read(models)
    error, skipped, num_seen = None, Counter(), 0
    for batch in read_validation(dataset, size, batch_size, rank, world_size, resample):
        error = batch.error
        skipped += batch.skipped
        for name, images in held.items():
            images.add(to_embeds[name](batch.images)[: len(batch.indices)], batch)
        num_seen += len(batch.indices) + batch.skipped.total()
        if progress is not None:
            progress("images", num_seen, mine)
    raise_together(error)
    skipped = count_together(skipped)
    return {
        name: _score(images, models[name], dataset.name, skipped, prompts, batch_size, progress)
        for name, images in held.items()
    }


def _what_all_read(models: dict[str, Towers]) -> tuple[int, Image.Resampling]:
    """The resolution and the resample that all models have in common."""
    (common,) = {(towers.resolution, towers.resample) for towers in models.values()}
    return common


class _Images:
    """What stays of this rank's images.

    Ranks and labels go into tensors made beforehand: small ones between the large ones that each
    batch needs for a moment would keep the allocator from using those again.

    Args:
        class_embeds: (C, E) fp32, or None.
        num_samples: number of this rank's samples, usable or not.
    """

    def __init__(self, class_embeds: Tensor | None, num_samples: int):
        self.num_images = self.num_skipped = self.num_labelled = 0
        self.noted: Counter[str] = Counter()
        self.captions: list[str] = []
        self.caption_keys: list[int] = []
        """Sorts the captions of all ranks: image's place * CAPTIONS_PER_IMAGE + number."""
        self._class_embeds = class_embeds
        self._embeds, self._places = [], []
        if class_embeds is not None:
            self._ranks, self._labels = class_embeds.new_empty(2, num_samples, dtype=torch.int64)
            self._margins = class_embeds.new_empty(num_samples)

    def add(self, embeds: Tensor, batch: ValidationBatch) -> None:
        """embeds: (M, E) fp32 of the batch's M samples."""
        self.num_images += len(batch.indices)
        self.num_skipped += batch.skipped.total()
        self.noted += batch.noted
        has_captions = torch.tensor([bool(own) for own in batch.captions], dtype=torch.bool)
        if has_captions.any() or not self._embeds:
            self._embeds.append(embeds[has_captions.to(embeds.device)])
            self._places.append(batch.indices[has_captions].to(embeds.device))
        for place, own in zip(batch.indices.tolist(), batch.captions, strict=True):
            self.captions += own
            self.caption_keys += [place * CAPTIONS_PER_IMAGE + n for n in range(len(own))]
        if self._class_embeds is not None:
            self._classify(embeds, batch.labels.to(embeds.device))

    def _classify(self, embeds: Tensor, labels: Tensor) -> None:
        labelled = labels != NO_LABEL
        embeds, labels = embeds[labelled], labels[labelled]
        new = slice(self.num_labelled, self.num_labelled + len(labels))
        self._labels[new] = labels
        self._ranks[new] = zero_shot.rank_classes(embeds, self._class_embeds, labels)
        if len(self._class_embeds) == 2:
            self._margins[new] = zero_shot.margins(embeds, self._class_embeds)
        self.num_labelled += len(labels)

    def captioned(self) -> tuple[Tensor, Tensor]:
        """The embeds (n, E) of all ranks' images with captions and their places (n,), ascending."""
        places = distributed.all_gather_rows(torch.cat(self._places))
        order = places.argsort()
        return distributed.all_gather_rows(torch.cat(self._embeds))[order], places[order]

    def classified(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Ranks, labels and, with two classes, margins of all ranks' labelled images, each (n,)."""
        ranks, labels, margins = (
            distributed.all_gather_rows(own[: self.num_labelled])
            for own in (self._ranks, self._labels, self._margins)
        )
        return ranks, labels, margins if len(self._class_embeds) == 2 else None


def _score(
    images: _Images,
    towers: Towers,
    set_name: str,
    skipped: Counter[str],
    prompts: ClassPrompts | None,
    batch_size: int,
    progress: Progress | None,
) -> dict[str, float]:
    counts = [images.num_images, len(images.captions), images.num_skipped, images.num_labelled]
    counts += [images.noted[kind] for kind in NOTE_KINDS]
    counts = distributed.all_gather_rows(torch.tensor([counts], device=towers.device)).sum(0)
    num_images, num_captions, num_skipped, num_labelled, *noted = counts.tolist()
    if not num_images:
        raise ConfigError(
            f"the validation set ({set_name}) holds no usable sample, {num_skipped} are "
            f"skipped ({show_kinds(skipped)}); give images with captions or .cls labels"
        )
    metrics = {"num_images": num_images, "num_skipped": num_skipped}
    metrics |= {f"{SKIPPED}{kind}": number for kind, number in sorted(skipped.items())}
    metrics |= {f"num_{k}": number for k, number in zip(NOTE_KINDS, noted, strict=True) if number}
    if num_captions:
        metrics |= _retrieval(images, towers, batch_size, progress)
    if prompts is not None and num_labelled:
        metrics |= _classification(images, prompts)
    return {name: float(value) for name, value in metrics.items()}


def _retrieval(
    images: _Images, towers: Towers, batch_size: int, progress: Progress | None
) -> dict[str, float]:
    keys = torch.tensor(images.caption_keys, dtype=torch.int64)
    text_embeds, keys = embed_captions(towers, batch_size, images.captions, keys, progress)
    # Images without a caption are no candidates: they are no caption's right answer.
    image_embeds, places = images.captioned()
    image_of_text = torch.searchsorted(places, keys // CAPTIONS_PER_IMAGE)
    recall = retrieval_recall(image_embeds, text_embeds, image_of_text)
    return {"num_captions": len(text_embeds), **recall}


def _classification(images: _Images, prompts: ClassPrompts) -> dict[str, float]:
    ranks, labels, margins = images.classified()
    num_classes, highest = len(prompts.names), int(labels.max())
    if highest >= num_classes:
        raise ConfigError(
            f"{prompts.source} names {num_classes} classes, but a sample's .cls is {highest}; "
            "give one name a line for every label from 0 on"
        )
    metrics = zero_shot.accuracy(ranks, labels)
    if margins is not None and labels.unique().numel() == 2:
        metrics["roc_auc"] = zero_shot.roc_auc(margins, labels)
    return {"num_classes": num_classes} | {f"zero_shot_{n}": v for n, v in metrics.items()}
