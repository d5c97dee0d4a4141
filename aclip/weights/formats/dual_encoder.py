"""Reads the Hugging Face folders that huggingface.py writes, without importing transformers."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor, cat, equal, eye, zeros_like

from aclip.weights.first_look import HUGGING_FACE_CONFIG
from aclip.weights.first_look import HUGGING_FACE_PROCESSOR as PROCESSOR
from aclip.weights.formats.clip_text import PREFIX
from aclip.weights.names import LOGIT_SCALE, TowerFacts

_VISION, _TEXT, _POOLER = "vision_model.", "text_model.", "vision_model.pooler.dense."
_VIT = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "layernorm.": "norm.",
    "encoder.layer.": "blocks.",
    ".layernorm_before.": ".norm1.",
    ".layernorm_after.": ".norm2.",
    ".attention.output.dense.": ".attn.proj.",
    ".intermediate.dense.": ".mlp.fc1.",
    ".output.dense.": ".mlp.fc2.",
}
"""Parts of a key and what they are in timm's ViT; replaced in this order."""
_QUERY, _QKV = ".attention.attention.query.", ("query", "key", "value")
_SCALING = {2: "bilinear", 3: "bicubic"}
"""Pillow's numbers."""


def is_of_hugging_face(state: dict[str, Tensor]) -> bool:
    """Whether the keys are of a two-tower model of Hugging Face's."""
    return any(key.startswith(_VISION) for key in state) and "visual_projection.weight" in state


def from_dual_encoder(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a dual encoder in aclip's names, where query, key and value are one.

    Raises:
        ValueError: its pooler is not the identity; the message ends a sentence.
    """
    weight, bias = (state.get(f"{_POOLER}{kind}") for kind in ("weight", "bias"))
    if weight is None or bias is None:
        raise ValueError("has no pooler of its image tower, such as launch/export.py writes")
    if not equal(weight, eye(len(weight))) or not equal(bias, zeros_like(bias)):
        raise ValueError("has a pooler behind its image tower, which aclip's towers do not have")
    ours = {}
    for key, tensor in state.items():
        if key.startswith(_TEXT):
            ours[PREFIX + key.removeprefix(_TEXT)] = tensor
        elif key == "visual_projection.weight":
            ours["image_projection.weight"] = tensor
        elif key == "logit_scale":
            ours[LOGIT_SCALE] = tensor.reshape(-1)
        elif not key.startswith(_VISION):
            ours[key] = tensor
        elif _QUERY in key:
            parts = [state.get(key.replace("query", part)) for part in _QKV]
            if any(part is None for part in parts):
                raise ValueError(f"has {key}, but not its key and value")
            ours[_timm_key(key.replace(_QUERY, ".attn.qkv."))] = cat(parts)
        elif ".attention.attention." not in key and not key.startswith(_POOLER):
            ours[_timm_key(key)] = tensor
    return ours


def _timm_key(key: str) -> str:
    name = key.removeprefix(_VISION)
    for theirs, ours in _VIT.items():
        name = name.replace(theirs, ours)
    return f"image.vit.{name}"


def read_facts(folder: Path) -> TowerFacts:
    """The numbers of heads that config.json tells.

    Raises:
        ValueError: a tower that aclip can't hold; the message ends a sentence.
    """
    vision, text, _ = _read_config(folder)
    if vision.get("hidden_act") != "gelu" or text.get("hidden_act") != "quick_gelu":
        raise ValueError(
            f"has the activations {vision.get('hidden_act')} and {text.get('hidden_act')}, but "
            "aclip's towers gelu and quick_gelu"
        )
    heads = (tower.get("num_attention_heads") for tower in (vision, text))
    return TowerFacts(*heads, image_activation="GELU")


def recipe_values(folder: Path) -> tuple[dict[str, Any], str]:
    """The recipe's `model` and `augment` that the folder says, and how images are scaled: bilinear
    or bicubic.

    Raises:
        ValueError: what aclip can't build or do, or keys are missing; the message ends a sentence.
    """
    read_facts(folder)
    vision, text, config = _read_config(folder)
    try:
        processor = json.loads((folder / PROCESSOR).read_text(encoding="utf-8"))["image_processor"]
        scale = _SCALING[processor["resample"]]
        model = {
            "image": {
                "name": "vit_base_patch16_224",
                "resolution": vision["image_size"],
                "kwargs": {
                    "patch_size": vision["patch_size"],
                    "embed_dim": vision["hidden_size"],
                    "depth": vision["num_hidden_layers"],
                    "num_heads": vision["num_attention_heads"],
                    "mlp_ratio": vision["intermediate_size"] / vision["hidden_size"],
                    "qkv_bias": vision["qkv_bias"],
                },
            },
            "text": {
                "width": text["hidden_size"],
                "heads": text["num_attention_heads"],
                "layers": text["num_hidden_layers"],
                "context_length": text["max_position_embeddings"],
            },
            "embed_dim": config["projection_dim"],
        }
        augment = {"mean": processor["image_mean"], "std": processor["image_std"]}
        epsilon = vision["layer_norm_eps"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"has no complete {HUGGING_FACE_CONFIG} and {PROCESSOR} ({error})"
        ) from None
    if epsilon != 1e-6:
        raise ValueError(
            f"has norms with epsilon {epsilon:g} in its image tower, but timm's ViT 1e-06"
        )
    return {"model": model, "augment": augment}, scale


def _read_config(folder: Path) -> tuple[dict, dict, dict]:
    """The sections of the image tower and the text tower, and the whole."""
    try:
        config = json.loads((folder / HUGGING_FACE_CONFIG).read_text(encoding="utf-8"))
        return config["vision_config"], config["text_config"], config
    except (OSError, ValueError, LookupError, TypeError):
        raise ValueError(f"has no complete {HUGGING_FACE_CONFIG}") from None
