"""Checkpoints of facebookresearch/SLIP and microsoft/A-CLIP.

Both are torch files {"epoch", "state_dict", "optimizer", ..., "args"} with keys `module.*`. A-CLIP
keeps an EMA copy beside the trained weights; it is what both evaluate, so it is what is read.
"""

from typing import Any

from torch import Tensor

from aclip.weights.formats.clip_text import from_clip_text, transposed
from aclip.weights.names import LOGIT_SCALE, TowerFacts

TRAINING_ONLY = ("image_mlp.", "im_proj_byol", "im_pred_byol")
EMA = "visual_ema."
_EMA_NAMES = {
    EMA: "visual.",
    "transformer_e.": "transformer.",
    "image_projection_e": "image_projection",
    "text_projection_e": "text_projection",
}
_IMAGE_HEADS = {384: 12, 768: 12, 1024: 16}
"""The released image towers' heads by width; timm's own ViT-S has 6."""
_TEXT_HEADS = {512: 8}
_IMAGE_TOWERS = {
    384: "vit_small_patch16_224",
    768: "vit_base_patch16_224",
    1024: "vit_large_patch16_224",
}
_PATCH = 16


def is_released(state: dict[str, Tensor]) -> bool:
    """Whether the keys, without `module.`, are of this layout."""
    return "image_projection" in state and "visual.cls_token" in state


def training_only(state: dict[str, Tensor]) -> set[str]:
    """The keys that no tower needs: heads, and the trained copy of what also has an average."""
    keys = {key for key in state if key.startswith(TRAINING_ONLY)}
    if any(key.startswith(EMA) for key in state):
        keys |= {key for key in state if key.startswith(tuple(_EMA_NAMES.values()))}
        keys -= {key for key in state if key.startswith(tuple(_EMA_NAMES))}
    return keys


def from_released(key: str, tensor: Tensor) -> dict[str, Tensor] | None:
    """What one tensor is in aclip's names; None if it has no counterpart."""
    for ema, name in _EMA_NAMES.items():
        if key.startswith(ema):
            key = name + key.removeprefix(ema)
            break
    if key.startswith("visual."):
        return {"image.vit." + key.removeprefix("visual."): tensor}
    if key == "image_projection":
        return {"image_projection.weight": transposed(tensor)}
    if key == "logit_scale":
        return {LOGIT_SCALE: tensor.reshape(-1)}
    return from_clip_text(key, tensor)


def facts(state: dict[str, Tensor]) -> TowerFacts:
    """The heads of the towers, by the widths that were released."""
    image_width = state["visual.cls_token"].shape[-1]
    text_width = state["ln_final.weight"].shape[0] if "ln_final.weight" in state else None
    return TowerFacts(_IMAGE_HEADS.get(image_width), _TEXT_HEADS.get(text_width))


def model_values(state: dict[str, Tensor]) -> dict[str, Any]:
    """The `model` section of a recipe that builds these towers.

    Raises:
        ValueError: towers of a width that was not released, or keys are missing; the message ends
            a sentence.
    """
    try:
        image_width = state["visual.cls_token"].shape[-1]
        side = round((state["visual.pos_embed"].shape[1] - 1) ** 0.5)
        context_length, text_width = state["positional_embedding"].shape
        embed_dim = state["image_projection"].shape[1]
    except (LookupError, ValueError):
        raise ValueError("lacks keys of that layout") from None
    if image_width not in _IMAGE_TOWERS or text_width not in _TEXT_HEADS:
        raise ValueError(
            f"has towers of width {image_width} and {text_width}, which were not released, so that "
            "their heads are unknown"
        )
    layers = {key.split(".")[2] for key in state if key.startswith("transformer.resblocks.")}
    image = {"name": _IMAGE_TOWERS[image_width], "resolution": _PATCH * side}
    return {
        "image": image | {"kwargs": {"num_heads": _IMAGE_HEADS[image_width]}},
        "text": {
            "width": text_width,
            "heads": _TEXT_HEADS[text_width],
            "layers": len(layers),
            "context_length": context_length,
        },
        "embed_dim": embed_dim,
    }
