"""InfoNCE of images and captions: CLIP's loss."""

import torch.nn.functional as F
from torch import Tensor

from aclip.distributed import gather_with_grad, rank
from aclip.kernels.contrastive_loss import contrastive_loss
from aclip.method.losses.several_captions import contrastive_of_several
from aclip.method.losses.term import LossTerm, StudentOutput
from aclip.section import Section, Weight

CHUNK_ROWS = 1024
"""Rows whose logits against the global batch exist at once: 128 MB of them at 32,768 columns."""


class Keys(Section):
    contrastive: Weight = 1.0
    """Weight of InfoNCE of images and captions."""


class Contrastive(LossTerm):
    name, keys, aligns = "contrastive", Keys, True

    def loss(self, output: StudentOutput, target: None) -> Tensor:
        if output.num_captions is not None:
            return contrastive_of_several(
                output.image_embeds, output.text_embeds, output.num_captions, output.logit_scale
            )
        return contrastive(output.image_embeds, output.text_embeds, output.logit_scale)


def contrastive(image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor) -> Tensor:
    """Symmetric InfoNCE between the views of the images and their captions, mean over the views.

    Args:
        image_embeds: (B, V, E) float, unnormalised.
        text_embeds: (B, E) float, unnormalised.
        logit_scale: (1,) float, the factor itself.

    Returns:
        Scalar fp32.

    Source: CLIP, arXiv:2103.00020; two views as in A-CLIP, arXiv:2212.08653, equation 4.
    """
    images = F.normalize(image_embeds.float(), dim=-1)  # (B, V, E)
    texts = F.normalize(text_embeds.float(), dim=-1)  # (B, E)
    all_images, all_texts = gather_with_grad(images), gather_with_grad(texts)  # (N, V, E), (N, E)
    scale, offset = logit_scale.float(), rank() * len(texts)
    total = texts.new_zeros(())
    for view in range(images.shape[1]):
        for rows, columns in ((images[:, view], all_texts), (texts, all_images[:, view])):
            total = total + contrastive_loss(rows, columns, scale, offset, CHUNK_ROWS) / 2
    return total / images.shape[1]
