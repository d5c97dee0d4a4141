"""Zero-shot classification from embeddings: pure functions on tensors, no model and no data."""

import torch.nn.functional as F
from torch import Tensor

from aclip.evaluation.ranking import rank_answers, share_within


def average_prompts(prompt_embeds: Tensor) -> Tensor:
    """Class embeddings: the mean over a class's prompts, each of length one, brought to length one.

    Args:
        prompt_embeds: (classes, prompts, E) float, raw or normalised.

    Returns:
        (classes, E) fp32, L2-normalised.

    Source: CLIP, arXiv:2103.00020, section 3.1.4, and openai/CLIP's
        Prompt_Engineering_for_ImageNet.ipynb.
    """
    return F.normalize(F.normalize(prompt_embeds.float(), dim=-1).mean(1), dim=-1)


def zero_shot_accuracy(
    image_embeds: Tensor, class_embeds: Tensor, labels: Tensor, ks: tuple[int, ...] = (1, 5)
) -> dict[str, float]:
    """Shares of images whose class is among the k nearest class embeddings.

    Equal similarities are ordered by class index (ranking.py). Every image counts the same,
    however many its class has. Two images of class 0, one of class 1, and the image embeddings
    nearest to classes 0, 1, 1 give `{"zero_shot_top1": 2 / 3, "zero_shot_top5": 1.0}`: there are
    no more than five classes.

    Args:
        image_embeds: (n, E) float.
        class_embeds: (classes, E) float, L2-normalised.
        labels: (n,) int64 class of each image.
        ks: the k reported.

    Returns:
        `zero_shot_top{k}` for each k, in [0, 1].
    """
    classes = labels.new_tensor(range(len(class_embeds)))
    ranks = rank_answers(image_embeds, class_embeds, labels, classes)
    return {f"zero_shot_top{k}": share_within(ranks, k) for k in ks}
