"""The loss terms: functions of tensors on the global batch, in fp32, without parameters.

Each rank returns the mean over its own rows against the columns of all ranks; the mean of the
ranks' values is the global loss, and averaging the ranks' gradients gives its gradient.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from aclip.distributed import gather_with_grad, rank
from aclip.kernels.contrastive_loss import contrastive_loss

# Rows whose logits against the global batch exist at once: 128 MB of them at 32,768 columns.
CHUNK_ROWS = 1024


@dataclass
class StudentOutput:
    """What the losses read. B samples of this rank, V views, E embedding, D head outputs.

    Attributes:
        image_embeds: (B, V, E), unnormalised. text_embeds: (B, E), unnormalised.
        logit_scale: (1,) fp32, the factor itself.
        simclr_embeds: (B, 2, D) or None. byol_predictions: (B, V, D) or None.
        distill, mlm: (B,) fp32, these terms of each sample, or None; they do not compare samples,
            so they are computed with the towers.
    """

    image_embeds: Tensor
    text_embeds: Tensor
    logit_scale: Tensor
    simclr_embeds: Tensor | None = None
    byol_predictions: Tensor | None = None
    distill: Tensor | None = None
    mlm: Tensor | None = None


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


def distill(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of the predicted codewords of the masked patches against the teacher's.

    Args:
        logits: (B, M, N) float, similarities to N codewords.
        targets: (B, M, N) float, probabilities; no gradient.
        temperature: divides the logits.

    Returns:
        (B,) fp32, mean over the masked patches of each sample.

    Source: MaskCLIP, arXiv:2208.12262.
    """
    log_probabilities = F.log_softmax(logits.float() / temperature, dim=-1)
    return -(targets.detach().float() * log_probabilities).sum(-1).mean(1)


def reconstruct(predictions: Tensor, targets: Tensor) -> Tensor:
    """Mean square error at the masked patches, for targets `features` and `pixels`.

    Args:
        predictions, targets: (B, M, D) float; no gradient into the targets.

    Returns:
        (B,) fp32, mean over the masked patches of each sample and over D.

    Source: MAE, arXiv:2111.06377.
    """
    return (predictions.float() - targets.detach().float()).square().mean((1, 2))


def mlm(logits: Tensor, labels: Tensor, rows: Tensor, weights: Tensor, num_rows: int) -> Tensor:
    """Cross-entropy of the masked tokens, each caption's mean.

    Args:
        logits: (T, vocabulary) float. labels: (T,) int64.
        rows: (T,) int64, the caption of each masked token.
        weights: (T,) fp32, one divided by the number of masked tokens of its caption.
        num_rows: B.

    Returns:
        (B,) fp32; 0 for a caption without masked tokens.
    """
    each = F.cross_entropy(logits.float(), labels, reduction="none")
    return each.new_zeros(num_rows).index_add(0, rows, each * weights)


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
        weights: contrastive, simclr, byol, distill, mlm.
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
    for name in ("distill", "mlm"):
        if weights[name] > 0:
            terms[name] = getattr(output, name).mean()
    loss = sum(weights[name] * term for name, term in terms.items())
    return loss, {name: term.detach() for name, term in terms.items()}
