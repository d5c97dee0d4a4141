"""Evaluates one pair of encoders on a validation set, all ranks together: retrieval and zero-shot.

Used during training and by launch/evaluate.py. The metrics are in retrieval.py and zero_shot.py.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from aclip.data.shards import Shard
from aclip.data.tokenizer import Tokenizer
from aclip.errors import ConfigError
from aclip.evaluation.prompts import ClassPrompts, find_class_prompts
from aclip.evaluation.retrieval import retrieval_recall
from aclip.evaluation.validation import NO_LABEL, ValidationBatch, read_validation
from aclip.evaluation.zero_shot import average_prompts, zero_shot_accuracy

Encoder = Callable[[Tensor], Tensor]
"""A batch to raw_embeds (n, E)."""

CAPTIONS_PER_IMAGE = 2**20
"""More than any image has."""


@torch.no_grad()
def evaluate(
    encode_image: Encoder,
    encode_text: Encoder,
    shards: list[Shard],
    tokenizer: Tokenizer,
    resolution: int,
    batch_size: int,
    device: torch.device,
    dtype: torch.dtype,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    gather: ModuleType,
) -> dict[str, float]:
    """Computes what the set allows: retrieval with captions, zero-shot with classes.

    Zero-shot needs `.cls` in the samples and a classnames.txt beside the shards (prompts.py). Every
    sample counts once, whatever the number of ranks, and every rank calls each encoder equally
    often. All ranks return the same.

    Args:
        encode_image: (n, 3, R, R) normalised pixels of `dtype` on `device` -> (n, E); in eval mode.
        encode_text: (n, L) int64 tokens on `device` -> (n, E); in eval mode.
        shards: the validation set.
        tokenizer: of the text tower.
        resolution: R, pixels.
        batch_size: images or texts of one call on one rank.
        device: where the encoders are and the ranking runs.
        dtype: of the pixels.
        mean: of the channels, pixels in [0, 1].
        std: of the channels, likewise.
        gather: the module aclip.gather: rank(), world_size(), all_gather_rows().

    Returns:
        image_to_text_r{1,5,10} and text_to_image_r{1,5,10}, zero_shot_top{1,5}: shares in [0, 1];
        and counts: num_images, num_skipped, with captions num_captions, with classes num_classes.

    Raises:
        ConfigError: no sample can be used, a class file is malformed, or a label has no class.
    """
    prompts = find_class_prompts(shards[0].url)
    rank, world_size = gather.rank(), gather.world_size()
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (mean, std))

    def to_embeds(images: Tensor) -> Tensor:
        pixels = ((images.to(device).float() / 255 - mean) / std).to(dtype)
        return F.normalize(encode_image(pixels).float(), dim=-1)

    batches = read_validation(shards, resolution, batch_size, rank, world_size)
    images = _embed_images(batches, to_embeds, device, gather)
    if not images.num_images:
        raise ConfigError(
            f"the validation set ({shards[0].url} ...) holds no usable sample, "
            f"{images.num_skipped} are skipped; give images with captions or .cls labels"
        )
    embed_texts = partial(_embed_texts, encode_text, tokenizer, batch_size, device, gather)
    metrics = {"num_images": images.num_images, "num_skipped": images.num_skipped}
    if images.num_captions:
        metrics |= _retrieval(images, embed_texts)
    if prompts is not None and (images.labels != NO_LABEL).any():
        metrics |= _zero_shot(images, prompts, embed_texts, rank, world_size)
    return {name: float(value) for name, value in metrics.items()}


@dataclass(frozen=True)
class _Images:
    """The usable images of all ranks in the set's order, and the captions of this rank's."""

    embeds: Tensor
    """(n, E) fp32, L2-normalised."""
    indices: Tensor
    """(n,) int64 places in the set, ascending."""
    labels: Tensor
    """(n,) int64 class or NO_LABEL."""
    captions: list[str]
    """Of this rank's images."""
    caption_keys: list[int]
    """Sorts the captions of all ranks: image's place in the set * CAPTIONS_PER_IMAGE + number."""
    num_images: int
    num_captions: int
    num_skipped: int
    """These three on all ranks together."""


def _embed_images(
    batches: Iterator[ValidationBatch], to_embeds: Encoder, device: torch.device, gather: ModuleType
) -> _Images:
    embeds, facts, captions, caption_keys, num_skipped = [], [], [], [], 0
    for batch in batches:
        embeds.append(to_embeds(batch.images)[: len(batch.indices)])
        facts.append(torch.stack([batch.indices, batch.labels], 1))
        for index, own in zip(batch.indices.tolist(), batch.captions, strict=True):
            captions += own
            caption_keys += [index * CAPTIONS_PER_IMAGE + number for number in range(len(own))]
        num_skipped += batch.skipped.total()
    embeds, facts = torch.cat(embeds), torch.cat(facts).to(device)
    counts = torch.tensor([[len(embeds), len(captions), num_skipped]], device=device)
    counts = gather.all_gather_rows(counts).sum(0).tolist()
    if counts[0]:  # the same on every rank, so all take part or none
        embeds, facts = gather.all_gather_rows(embeds), gather.all_gather_rows(facts)
    order = facts[:, 0].argsort()
    indices, labels = facts[order].T.contiguous()
    return _Images(embeds[order], indices, labels, captions, caption_keys, *counts)


def _embed_texts(
    encode_text: Encoder,
    tokenizer: Tokenizer,
    batch_size: int,
    device: torch.device,
    gather: ModuleType,
    texts: list[str],
    keys: Tensor,
) -> tuple[Tensor, Tensor]:
    """Embeds the texts of all ranks with equally many calls on each.

    Args:
        texts: this rank's; may be none as long as another rank has some.
        keys: (len(texts),) int64, unique over the ranks: the order of all texts.

    Returns:
        (m, E) fp32 L2-normalised embeds of all ranks' texts in the order of their keys, and the
        (m,) sorted keys.
    """
    largest = int(gather.all_gather_rows(torch.tensor([len(texts)], device=device)).max())
    batch_size = min(batch_size, largest)
    embeds = []
    for start in range(0, largest, batch_size):
        batch = texts[start : start + batch_size]
        # A rank without texts left takes part in the call with one that is cut off again.
        tokens = tokenizer.encode(batch or [""]).to(device)
        raw_embeds = encode_text(tokens)[: len(batch)]
        embeds.append(F.normalize(raw_embeds.float(), dim=-1))
    keys, order = gather.all_gather_rows(keys.to(device)).sort()
    return gather.all_gather_rows(torch.cat(embeds))[order], keys


def _retrieval(images: _Images, embed_texts: Callable) -> dict[str, float]:
    keys = torch.tensor(images.caption_keys, dtype=torch.int64)
    text_embeds, keys = embed_texts(images.captions, keys)
    # Images without a caption are no candidates: nothing could ever be right about them.
    captioned, image_of_text = (keys // CAPTIONS_PER_IMAGE).unique(return_inverse=True)
    image_embeds = images.embeds[torch.searchsorted(images.indices, captioned)]
    recall = retrieval_recall(image_embeds, text_embeds, image_of_text)
    return {"num_captions": len(text_embeds), **recall}


def _zero_shot(
    images: _Images, prompts: ClassPrompts, embed_texts: Callable, rank: int, world_size: int
) -> dict[str, float]:
    num_classes, highest = len(prompts.names), int(images.labels.max())
    if highest >= num_classes:
        raise ConfigError(
            f"{prompts.names_file} names {num_classes} classes, but a sample's .cls is {highest}; "
            "give one name a line for every label from 0 on"
        )
    texts = prompts.texts()
    prompt_embeds, _ = embed_texts(
        texts[rank::world_size], torch.arange(rank, len(texts), world_size)
    )
    class_embeds = average_prompts(prompt_embeds.unflatten(0, (num_classes, -1)))
    labelled = images.labels != NO_LABEL
    accuracy = zero_shot_accuracy(images.embeds[labelled], class_embeds, images.labels[labelled])
    return {"num_classes": num_classes, **accuracy}
