"""CLIP's and SigLIP's losses where an image has several captions, each of them a positive.

B images of this rank and M of all ranks, V views, E embedding, N captions of an image at most.
Image i has k_i captions, from 1 to N: the first k_i of its N places. The others count nowhere.

Rows have several positives, and columns may be empty, so that these are computed in plain torch, by
chunks; the ops of aclip.kernels know one positive a row.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from aclip.distributed import gather_with_grad, rank
from aclip.method.losses.chunks import by_chunks, soft_cross_entropy

CHUNK_LOGITS = 2**25
"""Logits that exist at once: 128 MB of them, and as much of each of their gradients."""
NEVER = torch.finfo(torch.float32).min
"""The logit of a place without a caption, which adds nothing to a softmax or a softplus."""


@dataclass(frozen=True)
class _Places:
    """Which places of the M x N captions hold one, and which are this rank's.

    Attributes:
        is_empty: (M * N,) bool.
        own: (B, N) int64, the places of each image of this rank.
        shares: (B, N) fp32, 1 / k_i where there is a caption, else 0.
        labels: (B * N, 1) int64, the image of each of this rank's places, among the M.
    """

    is_empty: Tensor
    own: Tensor
    shares: Tensor
    labels: Tensor

    @classmethod
    def of(cls, num_captions: Tensor, num_places: int) -> "_Places":
        places = torch.arange(num_places, device=num_captions.device)
        is_there = places < num_captions.unsqueeze(1)
        is_empty = places >= gather_with_grad(num_captions).unsqueeze(1)
        size = len(num_captions)
        images = torch.arange(size, device=num_captions.device) + rank() * size
        return cls(
            is_empty.flatten(),
            images.unsqueeze(1) * num_places + places,
            is_there / num_captions.unsqueeze(1),
            images.repeat_interleave(num_places).unsqueeze(1),
        )


def contrastive_of_several(
    image_embeds: Tensor, text_embeds: Tensor, num_captions: Tensor, logit_scale: Tensor
) -> Tensor:
    """Symmetric InfoNCE in which every caption of an image is its positive, mean over the views.

    From image to text: the cross-entropy of an image's softmax over all captions of the global
    batch, with the target 1 / k_i on each of its own; mean over the images. From text to image: the
    cross-entropy of a caption's softmax over all images; mean over the k_i captions of an image,
    then over the images. So all images count alike in both directions, and with one caption each
    this is CLIP's loss.

    Args:
        image_embeds: (B, V, E) float, unnormalised.
        text_embeds: (B, N, E) float, unnormalised.
        num_captions: (B,) int64, k_i.
        logit_scale: (1,) float, the factor itself.

    Returns:
        Scalar fp32.
    """
    images, texts = (F.normalize(each.float(), dim=-1) for each in (image_embeds, text_embeds))
    all_images, all_texts = gather_with_grad(images), gather_with_grad(texts).flatten(0, 1)
    places, scale = _Places.of(num_captions, texts.shape[1]), logit_scale.float()
    shares_of_texts, texts = places.shares.view(-1, 1), texts.flatten(0, 1)
    size = _chunk_size(all_texts)
    total = texts.new_zeros(())
    for own, every in zip(images.unbind(1), all_images.unbind(1), strict=True):

        def to_texts(rows: Tensor, ids: Tensor, shares: Tensor) -> Tensor:
            logits = (scale * rows @ all_texts.T).masked_fill(places.is_empty, NEVER)
            return soft_cross_entropy(logits, ids, shares)

        def to_images(rows: Tensor, ids: Tensor, shares: Tensor, every=every) -> Tensor:
            return soft_cross_entropy(scale * rows @ every.T, ids, shares)

        total = total + by_chunks(to_texts, size, own, places.own, places.shares).sum()
        total = total + by_chunks(to_images, size, texts, places.labels, shares_of_texts).sum()
    return total / (2 * images.shape[0] * images.shape[1])


def sigmoid_of_several(
    image_embeds: Tensor,
    text_embeds: Tensor,
    num_captions: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
) -> Tensor:
    """Sum over all captions of the global batch of -log sigmoid(z * logit), mean over the images
    and their views. z is 1 for each of an image's own captions and -1 for the others.

    The sum is divided by the number of images alone, as SigLIP's is, so that it grows with the
    number of captions; with one caption each this is SigLIP's loss.

    Args:
        image_embeds, text_embeds, num_captions, logit_scale: as contrastive_of_several takes them.
        logit_bias: (1,) float; logit = scale * cosine + bias.

    Returns:
        Scalar fp32.
    """
    images, texts = (F.normalize(each.float(), dim=-1) for each in (image_embeds, text_embeds))
    all_texts = gather_with_grad(texts).flatten(0, 1)
    places = _Places.of(num_captions, texts.shape[1])
    scale, bias = logit_scale.float(), logit_bias.float()

    def of_rows(rows: Tensor, own: Tensor) -> Tensor:
        logits = scale * rows @ all_texts.T + bias
        # With the positives' sign turned, every logit's loss is softplus.
        logits = logits.scatter(1, own, -logits.gather(1, own))
        return F.softplus(logits.masked_fill(places.is_empty, NEVER)).sum(1)

    size = _chunk_size(all_texts)
    each = [by_chunks(of_rows, size, view, places.own).mean() for view in images.unbind(1)]
    return torch.stack(each).mean()


def _chunk_size(columns: Tensor) -> int:
    return max(1, CHUNK_LOGITS // len(columns))
