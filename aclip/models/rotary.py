"""Rotary positions that follow the kept patches: each keeps the angles of its place in the grid.

M images, P patches, K of them kept, H heads of d.
"""

import torch
from torch import Tensor, nn


class RotaryPositions:
    """Sines and cosines of the patches that are there, for each block.

    Args:
        embeds: (P, 2 d), or (blocks, H, P, 2 d) where each block learns its own.
        keep_ids: (M, K) int64, the patches that are there; None for all.
    """

    def __init__(self, embeds: Tensor, keep_ids: Tensor | None):
        self._embeds, self._keep_ids = embeds, keep_ids
        self._of_all_blocks = None if embeds.ndim == 4 else self._kept(embeds)

    def of_block(self, index: int) -> Tensor:
        """What timm's apply_rot_embed_cat turns queries and keys (M, H, K, d) by."""
        if self._of_all_blocks is not None:
            return self._of_all_blocks
        return self._kept(self._embeds[index])

    def _kept(self, embeds: Tensor) -> Tensor:
        if self._keep_ids is None:
            return embeds
        # (H, M, K, 2 d) -> (M, H, K, 2 d), or (M, K, 2 d) -> (M, 1, K, 2 d) for all heads alike.
        kept = embeds[..., self._keep_ids, :]
        return kept.transpose(0, 1) if embeds.ndim == 3 else kept.unsqueeze(1)


class RotaryTable:
    """The rotary positions of a grid, in fp32 whatever the dtype of the weights.

    Args:
        rope: timm's module, without a grid of its own. One that learns nothing is asked once for
            each grid and device, since it makes some of its numbers on the CPU.
    """

    def __init__(self, rope: nn.Module):
        self._rope = rope
        self._learns = any(True for _ in rope.parameters())
        self._known: dict[tuple[int, torch.device], Tensor] = {}

    def of_grid(self, side: int, device: torch.device) -> Tensor:
        """The embeds that RotaryPositions takes, for side x side patches."""
        if self._learns:
            return self._rope.get_embed([side, side], dtype=torch.float32)
        key = (side, device)
        if key not in self._known:
            # Not as an inference tensor: an evaluation may ask before training does.
            with torch.inference_mode(False), torch.no_grad():
                embeds = self._rope.get_embed([side, side], dtype=torch.float32)
                self._known[key] = embeds.to(device)
        return self._known[key]
