"""The image tower: a timm VisionTransformer driven by our own forward.

Only kept patches enter the blocks, and the last block computes the CLS row alone: the feature is
read there, so nothing else of the last block's output is used. B images, P patches, K of them kept,
N = 1 + P or 1 + K tokens, C width.
"""

from collections.abc import Callable
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers import Attention, resample_abs_pos_embed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from aclip.config.sections import Recompute
from aclip.errors import ConfigError
from aclip.kernels.attentive_pack import attentive_pack
from aclip.method.masks.policy import Selection
from aclip.models.recompute import drops_values, run_block
from aclip.models.vit_block import cls_only_block, full_block


class ImageTower(nn.Module):
    """Images to CLS features, over all patches or the kept ones.

    Args:
        name: a timm VisionTransformer with a CLS token and learned positions.
        resolution: side of the images, pixels.
        kwargs: more keyword arguments of the timm model.
        freeze_patch_embed: the patch embedding gets no gradient.
        recompute: what the backward pass computes again (aclip/models/recompute.py).
        compile: whether torch.compile compiles each kind of block, on its first call.

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
        self.vit = _build_vit(name, resolution, kwargs or {})
        self.recompute = recompute
        self.compiled = compile
        self._full_block = torch.compile(full_block) if compile else full_block
        self._cls_only_block = torch.compile(cls_only_block) if compile else cls_only_block
        self.grid = self.vit.patch_embed.grid_size[0]
        self.patch_size = self.vit.patch_embed.patch_size[0]
        self.width = self.vit.embed_dim
        self.num_heads = self.vit.blocks[0].attn.num_heads
        self._drops_values = drops_values(self.vit)
        if freeze_patch_embed:
            self.vit.patch_embed.requires_grad_(False)

    @property
    def blocks(self) -> list[nn.Module]:
        """The transformer's blocks, from the input on."""
        return list(self.vit.blocks)

    def external_parameters(self) -> list[nn.Parameter]:
        """Parameters that are read outside the call of the module that owns them (for ZeRO-3)."""
        vit, qkv, proj = self.vit, self.vit.blocks[-1].attn.qkv, self.vit.patch_embed.proj
        parameters = [vit.cls_token, vit.pos_embed, qkv.weight, qkv.bias, proj.weight, proj.bias]
        return [parameter for parameter in parameters if parameter is not None]

    def forward(self, pixels: Tensor, selection: Selection | None = None) -> Tensor:
        """Encodes images to features.

        Args:
            pixels: (M, 3, R, R) float, normalised; with a selection M = B * V, sample-major.
            selection: which patches are kept; None for all.

        Returns:
            (M, C), the normalised CLS token.
        """
        x, _ = self._embed(pixels, selection)
        *blocks, last = self.vit.blocks
        for block in blocks:
            x = self._run(self._full_block, block, x)
        return self.vit.norm(self._run(self._cls_only_block, last, x))[:, 0]

    def forward_patches(
        self, pixels: Tensor, selection: Selection | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Encodes images to the features of all tokens that enter the blocks.

        Args:
            pixels, selection: the images, as `forward` takes them.

        Returns:
            tokens (M, 1 + K, C), normalised, row 0 the CLS token; and keep_ids (M, K) int64
            ascending, the patches of the other rows, None when all P are there.
        """
        x, keep_ids = self._embed(pixels, selection)
        for block in self.vit.blocks:
            x = self._run(self._full_block, block, x)
        return self.vit.norm(x), keep_ids

    def forward_with_scores(
        self, pixels: Tensor, score_layers: int | None = None, with_features: bool = True
    ) -> tuple[Tensor | None, Tensor]:
        """The attention of the CLS query to every patch, and the features if they are wanted.

        Args:
            pixels: (B, 3, T, T) float, normalised; T may differ from the tower's resolution, then
                the positions are interpolated.
            score_layers: how many blocks, from the first one on, the scores are the mean of; None
                for all.
            with_features: whether the features are wanted; without them the blocks behind those
                of the scores are not run.

        Returns:
            features (B, C) or None, and scores (B, g, g) fp32: mean over heads and the first
            `score_layers` blocks of the CLS row's softmax, g patches per side. No gradient through
            the scores.

        Source: A-CLIP, arXiv:2212.08653, section 3.2, which takes the scores of all layers.
        """
        x, _ = self._embed(pixels, None)
        scores = x.new_zeros(x.shape[0], x.shape[1] - 1, dtype=torch.float32)
        num_blocks = len(self.vit.blocks)
        num_scored = num_blocks if score_layers is None else score_layers
        num_run = num_blocks if with_features else num_scored
        # Not through `_run`: a block that runs again would add its scores again.
        for index, block in enumerate(self.vit.blocks[:num_run]):
            run = self._full_block if index + 1 < num_run else self._cls_only_block
            x = run("none", block, x, scores if index < num_scored else None, 1.0 / num_scored)
        features = self.vit.norm(x)[:, 0] if with_features else None
        side = pixels.shape[-1] // self.vit.patch_embed.patch_size[0]
        return features, scores.view(-1, side, side)

    def _embed(self, pixels: Tensor, selection: Selection | None) -> tuple[Tensor, Tensor | None]:
        """What enters the blocks (M, 1 + K, C), and the kept patches (M, K) or None."""
        tokens = self._embed_patches(pixels)
        if selection is None:
            x, keep_ids = self._add_cls_and_positions(tokens), None
        else:
            x, keep_ids = attentive_pack(
                tokens,
                self.vit.cls_token.flatten(),
                self.vit.pos_embed[0],
                selection.scores,
                selection.teacher_box,
                selection.view_boxes,
                selection.num_kept_blocks,
                selection.block_size,
            )
            keep_ids = keep_ids.flatten(0, 1)
        return self.vit.norm_pre(self.vit.pos_drop(x)), keep_ids

    def _embed_patches(self, pixels: Tensor) -> Tensor:
        embed = self.vit.patch_embed
        side = embed.patch_size[0]
        # The convolution's stride is its kernel, so it is one matrix product over the patches.
        patches = pixels.unflatten(3, (-1, side)).unflatten(2, (-1, side))  # (M, 3, g, p, g, p)
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (M, P, 3 * p * p)
        return embed.norm(F.linear(patches, embed.proj.weight.flatten(1), embed.proj.bias))

    def _add_cls_and_positions(self, tokens: Tensor) -> Tensor:
        positions = self.vit.pos_embed
        if tokens.shape[1] + 1 != positions.shape[1]:
            side = round(tokens.shape[1] ** 0.5)
            positions = resample_abs_pos_embed(positions, [side, side])
        cls = self.vit.cls_token.expand(len(tokens), -1, -1)
        return torch.cat([cls, tokens], dim=1) + positions

    def _run(self, function: Callable, *args) -> Tensor:
        random = self._drops_values
        return run_block(self.recompute, function, self.recompute, *args, draws_random=random)


def _build_vit(name: str, resolution: int, kwargs: dict[str, Any]) -> VisionTransformer:
    field = "model.image"
    if not timm.is_model(name):
        raise ConfigError(
            f"{field}.name is {name}, which timm does not know; take a VisionTransformer, e.g. "
            "vit_base_patch16_224"
        )
    try:
        vit = timm.create_model(name, num_classes=0, img_size=resolution, **kwargs)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise ConfigError(
            f"{field} is {name} at {resolution} px with {kwargs}, which timm refuses: {error}; "
            "change model.image.kwargs or resolution"
        ) from None
    problem = _unsupported(vit, resolution)
    if problem:
        raise ConfigError(
            f"{field}.name is {name}, which {problem}; take a VisionTransformer with a CLS token "
            "and learned positions, e.g. vit_base_patch16_224"
        )
    return vit


def _unsupported(vit: nn.Module, resolution: int) -> str | None:
    if type(vit) is not VisionTransformer:
        return f"is a {type(vit).__name__}"
    if vit.num_prefix_tokens != 1 or vit.cls_token is None:
        return f"has {vit.num_prefix_tokens} prefix tokens"
    if vit.pos_embed is None or vit.no_embed_class:
        return "has no learned position for its CLS token"
    if vit.global_pool != "token":
        return f"pools by {vit.global_pool}"
    if not all(type(block) is Block and type(block.attn) is Attention for block in vit.blocks):
        return "has blocks of another kind"
    if vit.blocks[0].attn.gate is not None:
        return "has gated attention"
    if not isinstance(vit.patch_drop, nn.Identity) or vit.head_drop.p:
        return "drops patches or features, which mask and heads do here"
    patch_height, patch_width = vit.patch_embed.patch_size
    if patch_height != patch_width or resolution % patch_height:
        return f"cuts {resolution} px into patches of {patch_height} x {patch_width} px"
    return None
