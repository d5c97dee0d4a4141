"""Masked language modelling of the caption (MaskCLIP). L tokens a caption, T masked ones in all."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from aclip.method.losses.term import (
    SampleTerm,
    TermContext,
    TermPart,
    transformer_blocks,
    trunc_normal,
)
from aclip.method.tokens import VOCAB_SIZE, Tokens
from aclip.section import Section, Weight


class Keys(Section):
    mlm: Weight = 0.0
    """Weight of masked language modelling; see MlmConfig."""


class MlmConfig(Section):
    """Masked language modelling of the caption (MaskCLIP). Read when loss.mlm has a weight."""

    mask_ratio: float = Field(0.2, gt=0, le=1)
    """Share of a caption's tokens that is masked, one or more; start and end are never masked."""
    decoder_layers: int = Field(4, ge=1)


@dataclass(frozen=True)
class MlmInput:
    """The T masked tokens of a batch of captions.

    Attributes:
        masked: (B, L) bool, whether a token is masked.
        ids: (T,) int64, flat positions of the masked tokens.
        labels: (T,) int64, what they were.
        rows, weights: (T,), see `mlm`.
    """

    masked: Tensor
    ids: Tensor
    labels: Tensor
    rows: Tensor
    weights: Tensor


class Mlm(SampleTerm):
    name, keys, section = "mlm", Keys, MlmConfig
    trains = ("text",)

    def __init__(self, recipe):
        super().__init__(recipe)
        self.config: MlmConfig = recipe.mlm
        self.context_length = recipe.model.text.context_length

    @classmethod
    def check(cls, recipe) -> None:
        number = recipe.data.captions_per_image
        if number > 1:
            raise ValueError(
                f"loss.mlm is {recipe.loss.mlm:g} with data.captions_per_image {number}, but it "
                "masks one caption of an image; set data.captions_per_image to 1 or loss.mlm to 0"
            )
        if recipe.model.text.name:
            raise ValueError(
                f"loss.mlm is {recipe.loss.mlm:g}, which predicts the words of CLIP's vocabulary, "
                f"but model.text.name is {recipe.model.text.name}, a tower with another; set "
                "loss.mlm to 0"
            )

    def parts(self, student: nn.Module) -> dict[str, TermPart]:
        width = student.text.width
        mask_token = trunc_normal(width)
        decoder = TextDecoder(width, self.config.decoder_layers, VOCAB_SIZE)
        return {"mlm_mask_token": TermPart(mask_token), "mlm_decoder": TermPart(decoder)}

    def noise_shape(self, grid: int) -> tuple[int, ...]:
        return (self.context_length,)

    def inputs(self, context: TermContext) -> MlmInput:
        masked = mask_tokens(context.tokens, context.noise, self.config.mask_ratio)
        # On the CPU, where the tokens still are: the number of masked tokens needs no host sync.
        ids = masked.flatten().nonzero().squeeze(1)
        rows = ids // masked.shape[1]
        move = context.to_device
        return MlmInput(
            masked=move(masked),
            ids=move(ids),
            labels=move(context.tokens.ids.flatten()[ids]),
            rows=move(rows),
            weights=move(1.0 / masked.sum(1)[rows]),
        )

    def encode(self, student: nn.Module, inputs, features: dict[str, Tensor]) -> Tensor:
        """(B,) fp32, the term of each sample."""
        own: MlmInput = inputs.of_terms[self.name]
        features = student.text.forward_tokens(inputs.tokens, own.masked, student.mlm_mask_token)
        columns = torch.arange(own.masked.shape[1], device=own.masked.device)
        is_real = columns < inputs.tokens.lengths.unsqueeze(1)
        logits = student.mlm_decoder(features, is_real, own.ids)
        return mlm(logits, own.labels, own.rows, own.weights, len(own.masked))


class TextDecoder(nn.Module):
    """Predicts the masked tokens from features of the whole caption, in both directions.

    Args:
        width: W, the text tower's width.
        num_layers: number of transformer blocks.
        vocab_size: size of the tokenizer's vocabulary.
    """

    def __init__(self, width: int, num_layers: int, vocab_size: int):
        super().__init__()
        self.blocks = transformer_blocks(width, num_layers)
        self.norm = nn.LayerNorm(width)
        self.to_vocabulary = nn.Linear(width, vocab_size)

    def forward(self, tokens: Tensor, is_real: Tensor, masked_ids: Tensor) -> Tensor:
        """Predicts the masked tokens.

        Args:
            tokens: (B, L, W) features of a caption with masked tokens.
            is_real: (B, L) bool, false at padding.
            masked_ids: (T,) int64, flat positions row * L + column of the masked tokens.

        Returns:
            (T, vocabulary) logits.
        """
        attends = is_real[:, None, None, :]  # (B, 1, 1, L): every token attends to the real ones
        for block in self.blocks:
            tokens = block(tokens, attn_mask=attends)
        return self.to_vocabulary(self.norm(tokens.flatten(0, 1)[masked_ids]))


def mask_tokens(tokens: Tokens, noise: Tensor, mask_ratio: float) -> Tensor:
    """Chooses the tokens that masked language modelling hides: those of the lowest noise.

    Args:
        tokens: B captions, start token first and end token last.
        noise: (B, at least L - 2) uniform; number i belongs to the caption's word piece i.
        mask_ratio: share of a caption's n word pieces, rounded, one or more where there are any.

    Returns:
        (B, L) bool, false at start, end and padding.
    """
    num_pieces = tokens.lengths.unsqueeze(1) - 2  # (B, 1)
    num_masked = (num_pieces * mask_ratio).round().clamp(min=1).minimum(num_pieces)
    pieces = torch.arange(tokens.ids.shape[1] - 2, device=noise.device)
    noise = noise[:, : len(pieces)].masked_fill(pieces >= num_pieces, 2.0)  # above any noise
    ranks = noise.argsort(dim=1, stable=True).argsort(dim=1)
    return F.pad(ranks < num_masked, (1, 1))


def mlm(logits: Tensor, labels: Tensor, rows: Tensor, weights: Tensor, num_rows: int) -> Tensor:
    """Cross-entropy of the masked tokens, each caption's mean.

    Args:
        logits: (T, vocabulary) float.
        labels: (T,) int64, what the masked tokens were.
        rows: (T,) int64, the caption of each masked token.
        weights: (T,) fp32, one divided by the number of masked tokens of its caption.
        num_rows: B.

    Returns:
        (B,) fp32; 0 for a caption without masked tokens.
    """
    each = F.cross_entropy(logits.float(), labels, reduction="none")
    return each.new_zeros(num_rows).index_add(0, rows, each * weights)
