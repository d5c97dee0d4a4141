"""The loss terms: functions of tensors on the global batch, in fp32, without parameters.

Each rank returns the mean over its own rows against the columns of all ranks; the mean of the
ranks' values is the global loss, and averaging the ranks' gradients gives its gradient.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from aclip.gather import gather_with_grad, rank
from aclip.kernels.contrastive_loss import contrastive_loss
from aclip.models.student import StudentOutput

# Rows whose logits against the global batch exist at once: 128 MB of them at 32,768 columns.
CHUNK_ROWS = 1024


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


def simclr(embeds: Tensor, temperature: float) -> Tensor:
    """NT-Xent between two views: a view's positive is the other view, its negatives all other
    images.

    Args:
        embeds: (B, 2, D) float, unnormalised head outputs.
        temperature: divides the cosine similarities.

    Returns:
        Scalar fp32, mean over both views.

    Source: SimCLR, arXiv:2002.05709, as used by SLIP, arXiv:2112.12750.
    """
    first, second = F.normalize(embeds.float(), dim=-1).unbind(1)  # (B, D) each
    all_embeds = gather_with_grad(torch.stack([first, second], dim=1))
    all_first, all_second = all_embeds.unbind(1)  # (N, D) each
    labels = _own_columns(len(first), first.device)
    itself = F.one_hot(labels, len(all_first)).bool()  # (B, N)

    def one_side(query: Tensor, same_view: Tensor, other_view: Tensor) -> Tensor:
        across = query @ other_view.T / temperature
        within = (query @ same_view.T / temperature).masked_fill(itself, float("-inf"))
        return F.cross_entropy(torch.cat([across, within], dim=1), labels)

    return (one_side(first, all_first, all_second) + one_side(second, all_second, all_first)) / 2


def byol(predictions: Tensor, targets: Tensor) -> Tensor:
    """2 - 2 cos between the student's predictions and the teacher's projection, mean over the
    views.

    Args:
        predictions: (B, V, D) float, the predictor's output for each student view.
        targets: (B, D) float, the teacher's projection of its own view; no gradient.

    Returns:
        Scalar fp32 in [0, 4].

    Source: BYOL, arXiv:2006.07733; "online to teacher" in A-CLIP, arXiv:2212.08653.
    """
    predictions = F.normalize(predictions.float(), dim=-1)
    targets = F.normalize(targets.detach().float(), dim=-1).unsqueeze(1)
    return (2 - 2 * (predictions * targets).sum(-1)).mean()


def _own_columns(num_rows: int, device: torch.device) -> Tensor:
    """The columns of the gathered batch that hold this rank's rows: (num_rows,) int64."""
    return torch.arange(num_rows, device=device) + rank() * num_rows


def total(
    output: StudentOutput, byol_target: Tensor | None, weights: dict[str, float], temperature: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of the terms whose weight is not 0.

    Args:
        output: of the student.
        byol_target: (B, D), the teacher's projection; read only when byol has a weight.
        weights: contrastive, simclr, byol.
        temperature: of simclr.

    Returns:
        Scalar fp32 loss with gradient, and the unweighted, detached terms.
    """
    terms = {
        "contrastive": contrastive(output.image_embeds, output.text_embeds, output.logit_scale)
    }
    if weights["simclr"] > 0:
        terms["simclr"] = simclr(output.simclr_embeds, temperature)
    if weights["byol"] > 0:
        terms["byol"] = byol(output.byol_predictions, byol_target)
    loss = sum(weights[name] * term for name, term in terms.items())
    return loss, {name: term.detach() for name, term in terms.items()}
