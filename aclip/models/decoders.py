"""Decoders of masked modelling: what the hidden patches and words were, from the visible ones.

They exist only during training, so that the towers need not keep what only reconstruction asks for.
B samples, P patches, K kept and M masked of them, L tokens.
"""

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

HEAD_WIDTH = 64


class PatchDecoder(nn.Module):
    """Kept patches' features to a prediction at each masked patch.

    Args:
        width: C of the image tower.
        num_patches: P, of a view.
        num_layers: transformer blocks.
        head: (B, M, C) to the prediction.

    Source: MAE, arXiv:2111.06377; as a part of CLIP training MaskCLIP, arXiv:2208.12262.
    """

    def __init__(self, width: int, num_patches: int, num_layers: int, head: nn.Module):
        super().__init__()
        self.mask_token = nn.Parameter(torch.empty(width))
        self.positions = nn.Parameter(torch.empty(1 + num_patches, width))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        nn.init.trunc_normal_(self.positions, std=0.02)
        self.blocks = _blocks(width, num_layers)
        self.norm = nn.LayerNorm(width)
        self.head = head

    def forward(self, tokens: Tensor, keep_ids: Tensor, masked_ids: Tensor) -> Tensor:
        """Predicts the masked patches.

        Args:
            tokens: (B, 1 + K, C), the image tower's normalised CLS token and kept patches.
            keep_ids: (B, K) int64 patch of each kept token. masked_ids: (B, M) int64.

        Returns:
            (B, M, D), what the head makes of each masked patch.
        """
        # Attention knows no order: the mask tokens follow the kept ones, each with its position.
        visible = tokens + self.positions[F.pad(keep_ids + 1, (1, 0))]
        masked = self.mask_token + self.positions[masked_ids + 1]
        x = self.blocks(torch.cat([visible, masked], dim=1))
        return self.head(self.norm(x[:, tokens.shape[1] :]))


class TextDecoder(nn.Module):
    """Token features to logits of the masked tokens; sees the whole caption, both directions.

    Args:
        width: W of the text tower.
        num_layers: transformer blocks.
        vocab_size: of the tokeniser.
    """

    def __init__(self, width: int, num_layers: int, vocab_size: int):
        super().__init__()
        self.blocks = _blocks(width, num_layers)
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


class Codewords(nn.Module):
    """Features to their cosine similarities with learned codewords: the online quantiser."""

    def __init__(self, width: int, num_codewords: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_codewords, width))
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, features: Tensor) -> Tensor:
        """(..., C) -> (..., num_codewords) in [-1, 1]."""
        return self.similarities(F.normalize(features, dim=-1))

    def similarities(self, unit_features: Tensor) -> Tensor:
        """The same for features of length one, or for differences of such."""
        return F.linear(unit_features, F.normalize(self.weight, dim=-1))


def _blocks(width: int, num_layers: int) -> nn.Sequential:
    num_heads = max(1, width // HEAD_WIDTH)
    while width % num_heads:
        num_heads -= 1
    return nn.Sequential(
        *(Block(width, num_heads=num_heads, qkv_bias=True) for _ in range(num_layers))
    )
