"""Zero-shot classification from embeddings: pure functions on tensors, no model and no data."""

import torch
import torch.nn.functional as F
from torch import Tensor

from aclip.evaluation.metrics.ranking import rank_answers, share_within


class PromptMeans:
    """Class embeddings from prompts that come batch by batch.

    A class's embedding is the mean of its prompts' normalised embeddings, normalised again. Sums
    are float64, so that neither the size nor the order of batches shows in the result.

    Args:
        num_classes: C.

    Source: CLIP, arXiv:2103.00020, section 3.1.4, and openai/CLIP's
        Prompt_Engineering_for_ImageNet.ipynb.
    """

    def __init__(self, num_classes: int):
        self._num_classes = num_classes
        self._sums: Tensor | None = None

    def add(self, prompt_embeds: Tensor, classes: Tensor) -> None:
        """prompt_embeds: (n, E) float, of any length; classes: (n,) int64 on the same device."""
        if self._sums is None:
            shape = (self._num_classes, prompt_embeds.shape[1])
            self._sums = torch.zeros(shape, dtype=torch.float64, device=prompt_embeds.device)
        embeds = F.normalize(prompt_embeds.float(), dim=-1)
        self._sums.index_add_(0, classes, embeds.double())

    def class_embeds(self) -> Tensor:
        """(C, E) fp32, L2-normalised. The mean's length cancels, so the sum does."""
        return F.normalize(self._sums, dim=-1).float()


def rank_classes(image_embeds: Tensor, class_embeds: Tensor, labels: Tensor) -> Tensor:
    """Places of the images' own classes among all, 0 is the top; ties by class index (ranking.py).

    Args:
        image_embeds: (n, E) float.
        class_embeds: (C, E) float.
        labels: (n,) int64.

    Returns:
        (n,) int64.
    """
    classes = torch.arange(len(class_embeds), device=labels.device)
    return rank_answers(image_embeds, class_embeds, labels, classes)


def margins(image_embeds: Tensor, class_embeds: Tensor) -> Tensor:
    """Similarity to class 1 less that to class 0: (n,) fp32 from (n, E) and (2, E) float."""
    scores = (image_embeds.double() @ class_embeds.double().T).float()
    return scores[:, 1] - scores[:, 0]


def accuracy(ranks: Tensor, labels: Tensor, ks: tuple[int, ...] = (1, 5)) -> dict[str, float]:
    """What the ranks of the right classes say.

    Three images of class 0, one of class 1, and ranks 0, 0, 7, 0 give top-1 3/4, top-5 3/4 and a
    mean per class of (2/3 + 1) / 2.

    Args:
        ranks: (n,) int64, see `rank_classes`.
        labels: (n,) int64.
        ks: the k reported.

    Returns:
        `top{k}`, the share of images whose class is among the k nearest, and `mean_per_class`, the
        mean of the classes' top-1; classes without an image don't count. All in [0, 1].
    """
    return {f"top{k}": share_within(ranks, k) for k in ks} | {
        "mean_per_class": mean_per_class(ranks, labels)
    }


def mean_per_class(ranks: Tensor, labels: Tensor) -> float:
    """Top-1 averaged over the classes that have images; 0 for no images at all."""
    if not len(labels):
        return 0.0
    counts = labels.bincount()
    hits = labels[ranks == 0].bincount(minlength=len(counts))
    present = counts > 0
    return (hits[present].double() / counts[present]).mean().item()


def roc_auc(margins: Tensor, labels: Tensor) -> float:
    """Area under the ROC curve: how often an image of class 1 has a larger margin than one of class
    0, a tie counting half.

    A NaN counts as the wrong answer, so that a diverged model never looks good.

    Args:
        margins: (n,) float, higher for class 1.
        labels: (n,) int64, 0 or 1.

    Returns:
        In [0, 1]; NaN where one of the classes has no image, since it is undefined.
    """
    positive = labels == 1
    num_positive = int(positive.sum())
    num_negative = len(labels) - num_positive
    if not num_positive or not num_negative:
        return float("nan")
    wrong = torch.where(positive, -torch.inf, torch.inf)
    scores = torch.where(margins.isnan(), wrong, margins.double())
    _, place, counts = scores.unique(return_inverse=True, return_counts=True)
    # Ranks from 1, those of equal scores averaged: the Mann-Whitney statistic.
    ranks = counts.cumsum(0).double() - (counts - 1) / 2
    above = ranks[place[positive]].sum() - num_positive * (num_positive + 1) / 2
    return (above / (num_positive * num_negative)).item()
