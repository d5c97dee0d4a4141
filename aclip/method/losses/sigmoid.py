"""SigLIP's loss: each pair of an image and a caption is a yes-or-no question of its own."""

import torch.nn.functional as F
from torch import Tensor, nn

from aclip.distributed import gather_with_grad, rank
from aclip.kernels.sigmoid_loss import sigmoid_loss
from aclip.method.losses.heads import ExactScalar
from aclip.method.losses.several_captions import sigmoid_of_several
from aclip.method.losses.term import LossTerm, StudentOutput, TermPart
from aclip.section import Section, Weight

CHUNK_ROWS = 1024
"""Rows whose logits against the global batch exist at once: 128 MB of them at 32,768 columns."""


class Keys(Section):
    sigmoid: Weight = 0.0
    """Sigmoid loss of images and captions, SigLIP's, in place of loss.contrastive."""
    initial_logit_bias: float = -10.0
    """What the sigmoid loss's learned bias starts at."""


class Sigmoid(LossTerm):
    name, keys, aligns = "sigmoid", Keys, True

    def __init__(self, recipe):
        super().__init__(recipe)
        self.initial_bias = recipe.loss.initial_logit_bias

    @classmethod
    def check(cls, recipe) -> None:
        if recipe.loss.contrastive > 0:
            raise ValueError(
                f"loss.sigmoid is {recipe.loss.sigmoid:g} with loss.contrastive "
                f"{recipe.loss.contrastive:g}, which would pull the same logit scale to another "
                "value; set one of them to 0"
            )

    def parts(self, student: nn.Module) -> dict[str, TermPart]:
        bias = ExactScalar("logit_bias", self.initial_bias)
        return {"logit_bias": TermPart(bias, exported=True)}

    def project(self, student: nn.Module, features: dict[str, Tensor]) -> Tensor:
        """(1,) fp32, the bias."""
        return student.logit_bias()

    def loss(self, output: StudentOutput, target: None) -> Tensor:
        images, texts, scale = output.image_embeds, output.text_embeds, output.logit_scale
        bias = output.heads[self.name]
        if output.num_captions is not None:
            return sigmoid_of_several(images, texts, output.num_captions, scale, bias)
        return sigmoid(images, texts, scale, bias)


def sigmoid(
    image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor, logit_bias: Tensor
) -> Tensor:
    """Sum over all captions of -log sigmoid(z * logit), mean over the images and their views.

    z is 1 for an image's own caption and -1 for the others of the global batch.

    Args:
        image_embeds: (B, V, E) float, unnormalised.
        text_embeds: (B, E) float, unnormalised.
        logit_scale, logit_bias: (1,) float; logit = scale * cosine + bias.

    Returns:
        Scalar fp32.

    Source: SigLIP, arXiv:2303.15343. There texts go round the ranks; here they are gathered, and
        chunks of rows bound the memory alike.
    """
    images = F.normalize(image_embeds.float(), dim=-1)  # (B, V, E)
    texts = F.normalize(text_embeds.float(), dim=-1)
    all_texts, offset = gather_with_grad(texts), rank() * len(texts)  # (N, E)
    scale, bias = logit_scale.float(), logit_bias.float()
    total = texts.new_zeros(())
    for view in images.unbind(1):
        total = total + sigmoid_loss(view, all_texts, scale, bias, offset, CHUNK_ROWS)
    return total / images.shape[1]
