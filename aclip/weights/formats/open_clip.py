"""open_clip's `local-dir` folder: open_clip_config.json and open_clip_model.safetensors.

The image tower is open_clip's adapter around a timm model or its own (open_clip_vit.py), the text
tower its CLIP transformer.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from aclip.config.recipe import Recipe
from aclip.method.tokens import VOCAB_SIZE
from aclip.weights.first_look import LOCAL_DIR, OPEN_CLIP_WEIGHTS
from aclip.weights.first_look import OPEN_CLIP_CONFIG as CONFIG
from aclip.weights.formats.clip_text import from_clip_text, to_clip_text
from aclip.weights.formats.open_clip_vit import MARK, from_open_clip_vit
from aclip.weights.hub import HUB
from aclip.weights.names import LOGIT_BIAS, LOGIT_SCALE, TowerFacts, vit_facts

WEIGHTS = OPEN_CLIP_WEIGHTS[0]
BUFFERS = {"attn_mask"}
"""In files of early versions, and no weights."""
TIMM_CONFIG = "config.json"
_TRUNK, _OUR_TRUNK = "visual.trunk.", "image.vit."
_PROJECTION, _OUR_PROJECTION = "visual.head.proj.weight", "image_projection.weight"
_NUMBERS = {"logit_scale": LOGIT_SCALE, "logit_bias": LOGIT_BIAS}
_HEAD_WIDTH = 64
"""Of open_clip's own image towers, unless their config says otherwise."""


def to_open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The model's tensors, out of a state with aclip's names, in open_clip's."""
    theirs = to_clip_text(state)
    for name, tensor in state.items():
        if name.startswith(_OUR_TRUNK):
            theirs[_TRUNK + name.removeprefix(_OUR_TRUNK)] = tensor
    theirs[_PROJECTION] = state[_OUR_PROJECTION]
    numbers = {key: state[name].reshape(()) for key, name in _NUMBERS.items() if name in state}
    return theirs | numbers


def is_open_clip(state: dict[str, Tensor]) -> bool:
    """Whether the keys are of a model of open_clip's, with timm's image tower or its own."""
    return _PROJECTION in state or MARK in state


def from_open_clip(key: str, tensor: Tensor) -> dict[str, Tensor] | None:
    """What one tensor of open_clip's is in aclip's names; None if it has no counterpart."""
    if key.startswith(_TRUNK):
        return {_OUR_TRUNK + key.removeprefix(_TRUNK): tensor}
    if key == _PROJECTION:
        return {_OUR_PROJECTION: tensor}
    if key.startswith("visual."):
        return from_open_clip_vit(key.removeprefix("visual."), tensor)
    if key in _NUMBERS:
        return {_NUMBERS[key]: tensor.reshape(-1)}
    # CustomTextCLIP keeps its text tower under a name of its own.
    return from_clip_text(key.removeprefix("text."), tensor)


def has_portable_name(recipe: Recipe) -> bool:
    """Whether open_clip builds the image tower from timm's name alone: it has no way to pass timm
    keyword arguments or a resolution, and a tower without them has other shapes, or, with another
    number of heads, silently other outputs."""
    image = recipe.model.image
    if image.kwargs:
        return False
    with torch.device("meta"):
        default = timm.create_model(image.name, num_classes=0)
    return default.patch_embed.img_size == (image.resolution, image.resolution)


def config(recipe: Recipe, pooling: str, place: str, state: dict[str, Tensor]) -> dict[str, Any]:
    """open_clip_config.json of a recipe's model.

    Args:
        pooling: the image tower's, as timm calls it.
        state: the model's tensors by aclip's names.
        place: where the export will stand, as `local-dir:` and a folder or `hf-hub:` and a name. A
            tower without a portable name is read by timm from the config.json in there, see
            `timm_config`.
    """
    model, text = recipe.model, recipe.model.text
    name = model.image.name if has_portable_name(recipe) else place
    # open_clip builds the bias only where the config gives it a value to start at.
    bias = {"init_logit_bias": state[LOGIT_BIAS].item()} if LOGIT_BIAS in state else {}
    return {
        "model_cfg": {
            **bias,
            "embed_dim": model.embed_dim,
            "quick_gelu": True,
            "vision_cfg": {
                "image_size": model.image.resolution,
                "timm_model_name": name,
                "timm_model_pretrained": False,
                "timm_pool": pooling,
                "timm_proj": "linear",
                "timm_proj_bias": False,
            },
            "text_cfg": {
                "context_length": text.context_length,
                "vocab_size": VOCAB_SIZE,
                "width": text.width,
                "heads": text.heads,
                "layers": text.layers,
            },
        },
        "preprocess_cfg": {
            "mean": list(recipe.augment.mean),
            "std": list(recipe.augment.std),
            "interpolation": "bilinear",
            "resize_mode": "shortest",
        },
    }


def timm_config(recipe: Recipe) -> dict[str, Any]:
    """timm's config.json of the image tower: its name with the keyword arguments that it needs."""
    image = recipe.model.image
    size = [3, image.resolution, image.resolution]
    return {
        "architecture": image.name.split(".")[0],
        "model_args": {**image.kwargs, "img_size": image.resolution},
        "pretrained_cfg": {
            "input_size": size,
            "num_classes": 0,
            "mean": list(recipe.augment.mean),
            "std": list(recipe.augment.std),
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "fixed_input_size": True,
        },
    }


def read_config(folder: Path) -> TowerFacts:
    """What open_clip_config.json says about a model.

    Raises:
        ValueError: a tower that aclip can't hold, or no such config; the message ends a sentence.
    """
    try:
        values = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["model_cfg"]
    except (OSError, UnicodeDecodeError, ValueError, LookupError, TypeError):
        raise ValueError(f"has no readable {CONFIG}") from None
    return facts_of_config(values, folder)


def facts_of_config(values: dict[str, Any], folder: Path | None = None) -> TowerFacts:
    """What the `model_cfg` of a config, or a config that ships with open_clip, says about a model.

    Args:
        folder: holds the config; None for one that ships with open_clip.

    Raises:
        ValueError: a tower that aclip can't hold; the message ends a sentence.
    """
    try:
        vision, text = values["vision_cfg"], values["text_cfg"]
        name = vision.get("timm_model_name")
        text_heads = text.get("heads", 8)
    except (LookupError, TypeError, AttributeError):
        raise ValueError(f"has no readable {CONFIG}") from None
    if not values.get("quick_gelu") or text.get("hf_model_name"):
        raise ValueError("has a text tower that is not CLIP's with QuickGELU")
    if not name:
        heads = vision.get("width", 768) // vision.get("head_width", _HEAD_WIDTH)
        return TowerFacts(heads, text_heads, "QuickGELU")
    name = name if folder is None else _at_hand(name, folder)
    try:
        with torch.device("meta"):
            vit = timm.create_model(name, num_classes=0)
        image = vit_facts(vit)
    except (RuntimeError, ValueError, OSError, AttributeError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"names the timm model {name}, which can't be built ({reason})") from None
    pooling = vision.get("timm_pool", "avg")
    if pooling not in (vit.global_pool, ""):
        raise ValueError(f"pools patches by {pooling}, not by {vit.global_pool} as timm's {name}")
    return replace(image, text_heads=text_heads)


def _at_hand(name: str, folder: Path) -> str:
    """The name of an image tower, without a need to ask the Hub: where its config.json, which was
    pushed together with the model's config, lies in this folder, the name is the folder's."""
    if not name.startswith(HUB):
        return name
    try:
        values = json.loads((folder / TIMM_CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return name
    is_timms = isinstance(values, dict) and "architecture" in values
    return f"{LOCAL_DIR}{folder.absolute()}" if is_timms else name


def recipe_values(folder: Path) -> tuple[dict[str, Any], str]:
    """The recipe's `model`, `augment` and, of a model with a bias, `loss` that
    open_clip_config.json says, and how images are scaled: bilinear or bicubic.

    Raises:
        ValueError: what aclip can't build or do; the message ends a sentence.
    """
    # Imported here, since open_clip takes seconds.
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    read_config(folder)
    values = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    model, preprocess = values["model_cfg"], values.get("preprocess_cfg", {})
    vision, text = model["vision_cfg"], model["text_cfg"]
    name, kwargs = vision.get("timm_model_name"), {}
    if not name:
        raise ValueError(
            "has open_clip's own image tower; say with --recipe which of timm's vit_..._clip "
            "towers has its shapes"
        )
    name = _at_hand(name, folder)
    if name.startswith(LOCAL_DIR):
        timm_values = json.loads((Path(name.removeprefix(LOCAL_DIR)) / TIMM_CONFIG).read_text())
        name, kwargs = timm_values["architecture"], dict(timm_values.get("model_args", {}))
        kwargs.pop("img_size", None)
    elif name.startswith(HUB):
        raise ValueError(f"names the timm model {name}, whose arguments are not in the folder")
    size = vision.get("image_size", 224)
    resize, scale = (
        preprocess.get(key, default)
        for key, default in (("resize_mode", "shortest"), ("interpolation", "bicubic"))
    )
    if resize != "shortest" or scale not in ("bilinear", "bicubic"):
        raise ValueError(f"scales images by resize_mode {resize} and interpolation {scale}")
    recipe = {
        "model": {
            "image": {
                "name": name,
                "resolution": size if isinstance(size, int) else size[0],
                "kwargs": kwargs,
            },
            "text": {
                "width": text.get("width", 512),
                "heads": text.get("heads", 8),
                "layers": text.get("layers", 12),
                "context_length": text.get("context_length", 77),
            },
            "embed_dim": model["embed_dim"],
        },
        "augment": {
            "mean": list(preprocess.get("mean", OPENAI_DATASET_MEAN)),
            "std": list(preprocess.get("std", OPENAI_DATASET_STD)),
        },
    }
    if model.get("init_logit_bias") is not None:
        recipe["loss"] = {"contrastive": 0, "sigmoid": 1}
    return recipe, scale
