"""The image tower: a timm VisionTransformer or Eva driven by our own forward.

Only kept patches enter the blocks, whatever the tower pools by. Where the feature is the CLS token,
the last block computes its row alone: nothing else of that block's output is used. B images, P
patches, K of them kept, S prefix rows (CLS token and registers, where a tower has them), N = S + P
or S + K rows, C width.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from timm.models.eva import Eva
from torch import Tensor, nn

from aclip.config.sections import Recompute
from aclip.method.masks.policy import Selection
from aclip.models import attention_pool, vit_block
from aclip.models.recompute import drops_values, run_block
from aclip.models.rotary import RotaryPositions, RotaryTable
from aclip.models.timm_vit import build_vit


class ImageTower(nn.Module):
    """Images to features, over all patches or the kept ones.

    Args:
        name: a timm VisionTransformer or Eva; see timm_vit.py.
        resolution: side of the images, pixels.
        kwargs: more keyword arguments of the timm model.
        freeze_patch_embed: the patch embedding gets no gradient.
        recompute: what the backward pass computes again (aclip/models/recompute.py).
        compile: whether torch.compile compiles each kind of block, on its first call.

    Attributes:
        num_prefix: S, the CLS token and the registers.
        pooling: what the feature is read from, as timm calls it: "token" (CLS), "map" (attention
            pool), "avg", "avgmax" or "max". None of them reads a patch that was dropped.

    Raises:
        ConfigError: timm doesn't know the name or a keyword, or it is another kind of network.
    """

    def __init__(
        self,
        name: str,
        resolution: int,
        kwargs: dict[str, Any] | None = None,
        freeze_patch_embed: bool = True,
        recompute: Recompute = "none",
        compile: bool = False,
    ):
        super().__init__()
        self.vit = build_vit(name, resolution, kwargs or {})
        self.recompute = recompute
        self.compiled = compile
        full, cls_only = vit_block.full_block, vit_block.cls_only_block
        self._full_block = torch.compile(full) if compile else full
        self._cls_only_block = torch.compile(cls_only) if compile else cls_only
        self.grid = self.vit.patch_embed.grid_size[0]
        self.patch_size = self.vit.patch_embed.patch_size[0]
        self.width = self.vit.embed_dim
        self.num_heads = self.vit.blocks[0].attn.num_heads
        self.num_prefix = self.vit.num_prefix_tokens
        self.pooling = self.vit.global_pool
        rope = getattr(self.vit, "rope", None)
        self._rotary = None if rope is None else RotaryTable(rope)
        self._drops_values = drops_values(self.vit)
        if freeze_patch_embed:
            self.vit.patch_embed.requires_grad_(False)

    @property
    def blocks(self) -> list[nn.Module]:
        """The transformer's blocks, from the input on."""
        return list(self.vit.blocks)

    @property
    def has_scores(self) -> bool:
        """Whether a single query attends to the patches, so that its attention can score them."""
        return self.pooling in ("token", "map")

    @property
    def num_prefix_positions(self) -> int:
        """How many rows of the learned positions are those of prefix rows."""
        return 0 if self.vit.no_embed_class else self.num_prefix

    def external_parameters(self) -> list[nn.Parameter]:
        """Parameters that are read outside the call of the module that owns them (for ZeRO-3)."""
        vit, proj = self.vit, self.vit.patch_embed.proj
        parameters = [vit.cls_token, vit.reg_token, vit.pos_embed, proj.weight, proj.bias]
        *blocks, last = vit.blocks
        for block in blocks:
            parameters += vit_block.read_outside(block, cls_only=False)
        parameters += vit_block.read_outside(last, cls_only=self.pooling == "token")
        if self.pooling == "map":
            parameters += attention_pool.read_outside(vit.attn_pool)
        if self._rotary is not None:
            parameters += vit.rope.parameters()
        return [parameter for parameter in parameters if parameter is not None]

    def assign(self, state: dict[str, Tensor]) -> None:
        """Takes weights over, in a tower that was built on the meta device."""
        if self._rotary is not None:
            # Some of its numbers are no weights.
            self.vit.rope.to_empty(device="cpu").init_non_persistent_buffers()
        self.load_state_dict(state, assign=True)

    def forward(self, pixels: Tensor, selection: Selection | None = None) -> Tensor:
        """Encodes images to features.

        Args:
            pixels: (M, 3, R, R) float, normalised; with a selection M = B * V, sample-major.
            selection: which patches are kept; None for all.

        Returns:
            (M, C), normalised: the CLS token, or what the pooling makes of the patches that are
            there.
        """
        x, _, rotary = self._embed(pixels, selection)
        last = len(self.vit.blocks) - 1
        for index, block in enumerate(self.vit.blocks):
            x = self._run(self._block_function(index == last), block, x, _of_block(rotary, index))
        return self._pool(x)[0]

    def forward_patches(
        self, pixels: Tensor, selection: Selection | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Encodes images to the features of all rows that enter the blocks.

        Args:
            pixels, selection: the images, as `forward` takes them.

        Returns:
            rows (M, S + K, C), normalised, the first `num_prefix` the CLS token and registers; and
            keep_ids (M, K) int64 ascending, the patches of the other rows, None when all P are
            there.
        """
        x, keep_ids, rotary = self._embed(pixels, selection)
        for index, block in enumerate(self.vit.blocks):
            x = self._run(self._full_block, block, x, _of_block(rotary, index))
        return self.vit.fc_norm(self.vit.norm(x)), keep_ids

    def forward_with_scores(
        self, pixels: Tensor, score_layers: int | None = None, with_features: bool = True
    ) -> tuple[Tensor | None, Tensor | None]:
        """Encodes the teacher view: its features, if they are wanted, and the attention that scores
        its patches, that of the query by which the feature is read.

        Args:
            pixels: (B, 3, T, T) float, normalised; T may differ from the tower's resolution, then
                the positions are interpolated.
            score_layers: how many blocks, from the first one on, the scores are the mean of; None
                for all. Only where the feature is the CLS token.
            with_features: whether the features are wanted; without them nothing runs that only
                they need.

        Returns:
            features (B, C) or None, and scores (B, S, S) fp32, S patches per side: the CLS row's
            softmax, mean over heads and the first `score_layers` blocks; or that of the attention
            pool's query, mean over its heads; None where neither is there. No gradient through the
            scores.

        Source: A-CLIP, arXiv:2212.08653, section 3.2, which takes the scores of all layers.
        """
        if not self.has_scores:
            return (self(pixels) if with_features else None), None
        x, _, rotary = self._embed(pixels, None)
        side = pixels.shape[-1] // self.patch_size
        num_blocks = len(self.vit.blocks)
        if self.pooling == "map":
            for index, block in enumerate(self.vit.blocks):
                x = self._full_block("none", block, x, _of_block(rotary, index))
            features, attention = self._pool(x)
            scores = attention.detach().mean(1)[:, -(side**2) :]
            return features if with_features else None, scores.reshape(-1, side, side)
        scores = x.new_zeros(x.shape[0], x.shape[1] - 1, dtype=torch.float32)
        num_scored = num_blocks if score_layers is None else score_layers
        num_run = num_blocks if with_features else num_scored
        # Not through `_run`: a block that runs again would add its scores again.
        for index, block in enumerate(self.vit.blocks[:num_run]):
            run = self._block_function(index + 1 == num_run)
            own = scores if index < num_scored else None
            x = run("none", block, x, _of_block(rotary, index), own, 1.0 / num_scored)
        features = self._pool(x)[0] if with_features else None
        return features, scores[:, -(side**2) :].reshape(-1, side, side)

    def embed_patches(self, pixels: Tensor) -> Tensor:
        """Patch embeddings without positions: pixels (M, 3, R, R) -> (M, P, C)."""
        embed = self.vit.patch_embed
        side = self.patch_size
        # The convolution's stride is its kernel, so it is one matrix product over the patches.
        patches = pixels.unflatten(3, (-1, side)).unflatten(2, (-1, side))  # (M, 3, g, p, g, p)
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (M, P, 3 * p * p)
        return embed.norm(F.linear(patches, embed.proj.weight.flatten(1), embed.proj.bias))

    def _block_function(self, is_last: bool) -> Callable:
        return self._cls_only_block if is_last and self.pooling == "token" else self._full_block

    def _pool(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The last block's output -> features (M, C), and the pool's attention, if it has a query:
        (M, heads, rows) fp32, patches behind what else it attends to."""
        vit, attention = self.vit, None
        x = vit.norm(x)
        if self.pooling == "token":
            x = x[:, 0]
        elif self.pooling == "map":
            pools_prefix = type(vit) is Eva or vit.pool_include_prefix
            x = x if pools_prefix else x[:, self.num_prefix :]
            x, attention = attention_pool.attention_pool(vit.attn_pool, x)
        else:
            x = vit.pool(x)
        return vit.fc_norm(x), attention

    def _embed(
        self, pixels: Tensor, selection: Selection | None
    ) -> tuple[Tensor, Tensor | None, RotaryPositions | None]:
        """What enters the blocks (M, S + K, C), the kept patches (M, K) or None, and their rotary
        positions, where the tower has any."""
        patches = self.embed_patches(pixels)
        side = pixels.shape[-1] // self.patch_size
        keep_ids = None
        if selection is None:
            x = self._add_prefix_and_positions(patches, side)
        else:
            x, keep_ids = self._pack(patches, selection)
        rotary = None
        if self._rotary is not None:
            embeds = self._rotary.of_grid(side, x.device)
            rotary = RotaryPositions(embeds, keep_ids)
        return self.vit.norm_pre(self.vit.pos_drop(x)), keep_ids, rotary

    def _add_prefix_and_positions(self, patches: Tensor, side: int) -> Tensor:
        positions, prefix = self.vit.pos_embed, self._prefix()
        if positions is None:
            return torch.cat([prefix.expand(len(patches), -1, -1), patches], dim=1)
        num_positions = self.num_prefix_positions
        if patches.shape[1] + num_positions != positions.shape[1]:
            positions = resample_abs_pos_embed(
                positions, [side, side], num_prefix_tokens=num_positions
            )
        if num_positions == self.num_prefix:
            return torch.cat([prefix.expand(len(patches), -1, -1), patches], dim=1) + positions
        return torch.cat([prefix.expand(len(patches), -1, -1), patches + positions], dim=1)

    def _prefix(self) -> Tensor:
        """(1, S, C): the CLS token and the registers, without positions."""
        parts = [part for part in (self.vit.cls_token, self.vit.reg_token) if part is not None]
        if not parts:
            return self.vit.patch_embed.proj.weight.new_zeros(1, 0, self.width)
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _pack(self, patches: Tensor, selection: Selection) -> tuple[Tensor, Tensor]:
        """Kept patches with positions behind the prefix (M, S + K, C), and their ids (M, K)."""
        first, positions, prefix = self._rows_of_op(patches)
        x, keep_ids = selection.pack(patches, first, positions)
        if prefix is not None:
            x = torch.cat([prefix.to(x.dtype).expand(len(x), -1, -1), x[:, 1:]], dim=1)
        return x, keep_ids.flatten(0, 1)

    def _rows_of_op(self, patches: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """What `attentive_pack` takes beside the patches: a first row (C,) and the positions
        (1 + P, C). Then the prefix (1, S, C) that takes the first row's place afterwards; None
        where that row is the prefix already, a single CLS token with a position."""
        positions, num_positions = self.vit.pos_embed, self.num_prefix_positions
        if positions is not None and self.num_prefix == num_positions == 1:
            return self._prefix().flatten(), positions[0], None
        prefix, nothing = self._prefix(), patches.new_zeros(1, self.width)
        if positions is None:
            return nothing[0], nothing.expand(1 + patches.shape[1], -1), prefix
        if num_positions:
            prefix = prefix + positions[:, :num_positions]
        positions = positions[0, num_positions:]
        return nothing[0], torch.cat([nothing.to(positions.dtype), positions]), prefix

    def _run(self, function: Callable, *args) -> Tensor:
        # Once for run_block, which may recompute the whole block, and once for the block itself.
        mode, random = self.recompute, self._drops_values
        return run_block(mode, function, mode, *args, draws_random=random)


def _of_block(rotary: RotaryPositions | None, index: int) -> Tensor | None:
    return None if rotary is None else rotary.of_block(index)
