"""Embeds texts on all ranks together: captions one by one, classes as means over their prompts."""

import math
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor

from aclip import distributed
from aclip.evaluation.metrics.zero_shot import PromptMeans
from aclip.evaluation.sets.prompts import ClassPrompts
from aclip.evaluation.towers import Progress, Towers


def embed_captions(
    towers: Towers,
    batch_size: int,
    texts: list[str],
    keys: Tensor,
    progress: Progress | None = None,
) -> tuple[Tensor, Tensor]:
    """Embeds the texts of all ranks with equally many calls on each.

    Args:
        towers: the pair with the text encoder.
        batch_size: texts of one call on one rank.
        texts: this rank's; may be none as long as another rank has some.
        keys: (len(texts),) int64, unique over the ranks: the order of all texts.
        progress: hears from time to time what is done.

    Returns:
        (m, E) fp32 L2-normalised embeds of all ranks' texts in the order of their keys, and the
        (m,) sorted keys.
    """
    count = torch.tensor([len(texts)], device=towers.device)
    largest = int(distributed.all_gather_rows(count).max())
    batch_size = min(batch_size, largest)
    embeds = []
    for start in range(0, largest, batch_size):
        raw_embeds = _encode(towers, texts[start : start + batch_size])
        embeds.append(F.normalize(raw_embeds.float(), dim=-1))
        if progress is not None:
            progress("captions", min(len(texts), start + batch_size), len(texts))
    keys, order = distributed.all_gather_rows(keys.to(towers.device)).sort()
    return distributed.all_gather_rows(torch.cat(embeds))[order], keys


def embed_classes(
    towers: Towers,
    batch_size: int,
    prompts: ClassPrompts,
    progress: Progress | None = None,
) -> Tensor:
    """Class embeddings, prompts streamed in batches: only the classes' sums are kept.

    Rank c % world_size alone embeds class c. All ranks call the encoder equally often.

    Returns:
        (C, E) fp32, L2-normalised, equal on every rank.
    """
    rank, world_size, num_classes = distributed.rank(), distributed.world_size(), len(prompts.names)
    num_texts = [
        sum(prompts.num_texts(label) for label in range(r, num_classes, world_size))
        for r in range(world_size)
    ]
    own = range(rank, num_classes, world_size)
    means = PromptMeans(len(own))
    stream = ((text, place) for place, label in enumerate(own) for text in prompts.texts(label))
    for number in range(math.ceil(max(num_texts) / batch_size)):
        batch = list(islice(stream, batch_size))
        raw_embeds = _encode(towers, [text for text, _ in batch])
        places = torch.tensor([place for _, place in batch], dtype=torch.int64)
        means.add(raw_embeds, places.to(towers.device))
        if progress is not None:
            progress("prompts", min(num_texts[rank], (number + 1) * batch_size), num_texts[rank])
    labels = distributed.all_gather_rows(torch.tensor(own, dtype=torch.int64, device=towers.device))
    return distributed.all_gather_rows(means.class_embeds())[labels.argsort()]


def _encode(towers: Towers, texts: list[str]) -> Tensor:
    """(len(texts), E); a rank without texts encodes an empty one and drops its row."""
    tokens = towers.tokenizer.encode(texts or [""])
    return towers.encode_text(tokens.map(lambda ids: ids.to(towers.device)))[: len(texts)]
