"""The networks of timm's that an image tower can be, and why others can't.

Patches may be dropped where each of them enters with a position of its own and nothing else knows
the grid: what is left is then computed as if the others had never been there.
"""

from typing import Any

import timm
from timm.layers import Attention, AttentionRope, PatchEmbed
from timm.models import model_entrypoint
from timm.models.eva import Eva, EvaAttention, EvaBlock
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from aclip.errors import ConfigError

POOLINGS = ("token", "map", "avg", "avgmax", "max")
"""How features are read: from the CLS token, by an attention pool, or as a mean or maximum."""


def build_vit(name: str, resolution: int, kwargs: dict[str, Any]) -> VisionTransformer | Eva:
    """timm's network without its classifier.

    Raises:
        ConfigError: timm doesn't know the name or a keyword, or the network can't be a tower.
    """
    field = "model.image"
    if not timm.is_model(name):
        raise ConfigError(
            f"{field}.name is {name}, which timm does not know; take a VisionTransformer, e.g. "
            "vit_base_patch16_224"
        )
    # Rotary positions of a fixed grid are stored in the weights' dtype, and would not fit a teacher
    # of another resolution; this changes nothing else that a tower uses.
    any_grid = {}
    if model_entrypoint(name).__module__ == Eva.__module__:
        any_grid = {"dynamic_img_size": True}
    try:
        vit = timm.create_model(name, num_classes=0, img_size=resolution, **{**kwargs, **any_grid})
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise ConfigError(
            f"{field} is {name} at {resolution} px with {kwargs}, which timm refuses: {error}; "
            "change model.image.kwargs or resolution"
        ) from None
    problem = _unsupported(vit, resolution)
    if problem:
        raise ConfigError(
            f"{field}.name is {name}, which {problem}; take a VisionTransformer or Eva of timm's "
            "with positions of its patches, e.g. vit_base_patch16_224"
        )
    return vit


def _unsupported(vit: nn.Module, resolution: int) -> str | None:
    """Why a network can't be a tower, in words that end a sentence; None if it can."""
    if type(vit) not in (VisionTransformer, Eva):
        return f"is a {type(vit).__name__}, whose layers may need the whole grid of patches"
    return (
        _unsupported_positions(vit)
        or _unsupported_blocks(vit)
        or _unsupported_patches(vit, resolution)
    )


def _unsupported_positions(vit: VisionTransformer | Eva) -> str | None:
    rope = getattr(vit, "rope", None)
    if vit.pos_embed is None and rope is None:
        return "has no positions, so that it can't tell where a kept patch lies"
    if getattr(rope, "aug_active", False):
        return "draws its rotary positions at random in training, which no seed of a sample repeats"
    return None


def _unsupported_blocks(vit: VisionTransformer | Eva) -> str | None:
    kinds = (EvaBlock, (EvaAttention, AttentionRope)) if type(vit) is Eva else (Block, (Attention,))
    for block in vit.blocks:
        if type(block) is not kinds[0] or type(block.attn) not in kinds[1]:
            return "has blocks of another kind than timm's Block or EvaBlock"
        if block.attn.gate is not None:
            return "has gated attention"
        if getattr(block.attn, "num_kv_groups", 1) > 1:
            return "shares keys and values between heads"
    return None


def _unsupported_patches(vit: VisionTransformer | Eva, resolution: int) -> str | None:
    if vit.global_pool not in POOLINGS:
        return f"pools by {vit.global_pool or 'nothing'}"
    if not isinstance(vit.patch_drop, nn.Identity | None) or vit.head_drop.p:
        return "drops patches or features, which mask and heads do here"
    if type(vit.patch_embed) is not PatchEmbed:
        return f"embeds patches by a {type(vit.patch_embed).__name__}"
    height, width = vit.patch_embed.patch_size
    if height != width or resolution % height:
        return f"cuts {resolution} px into patches of {height} x {width} px"
    return None
