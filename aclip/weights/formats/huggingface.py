"""Hugging Face's VisionTextDualEncoder folder: ViT and CLIP text model, tokeniser, image processor.

Needs transformers 5. CLIPModel can't hold a plain ViT: it has a norm in front of its blocks.
"""

import re
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessor,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    VisionTextDualEncoderProcessor,
    ViTConfig,
)

from aclip.config.recipe import Recipe
from aclip.models.student import Student
from aclip.weights.formats.clip_text import PREFIX, TEXT_PROJECTION
from aclip.weights.formats.huggingface_tokenizer import NOT_CLEANED, build_tokenizer
from aclip.weights.names import LOGIT_SCALE

DIFFERENCES = (
    NOT_CLEANED,
    "The image processor cuts the centre rounding half a pixel down, training to even: for one "
    "image in four the square lies one pixel further to the left or top.",
)
"""What transformers does otherwise than training, for the card."""
NO_BIAS = (
    "The logit bias of SigLIP's loss has no place in this format. It is the same for all pairs, so "
    "that no ranking changes; probabilities are those of a softmax over the texts."
)
_VIT = "image.vit."
_VIT_ONCE = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}
_IN_BLOCK = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.o_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_QKV = ("q_proj", "k_proj", "v_proj")
_BLOCK_KEY = re.compile(r"blocks\.(\d+)\.(.+)\.(weight|bias)")


def unsupported(student: Student) -> str | None:
    """Why ViTModel can't hold the image tower, in words that end a sentence; None if it can."""
    vit, image = student.image.vit, student.image
    if image.pooling != "token" or image.num_prefix != 1 or vit.no_embed_class:
        return (
            "has no CLS token with a position, or does not pool by it, as Hugging Face's ViT does"
        )
    if getattr(vit, "rope", None) is not None:
        return "has rotary positions, which Hugging Face's ViT has not"
    names = {name for name, _ in vit.named_parameters()}
    unknown = sorted(name for name in names if _convert_vit(name, None) is None)
    if unknown:
        return f"has {unknown[0]}, which Hugging Face's ViT has not"
    block = vit.blocks[0]
    needed = {*_VIT_ONCE, "blocks.0.attn.proj.bias", "blocks.0.mlp.fc1.bias"}
    absent = sorted(needed - names)
    if absent:
        return f"has no {absent[0]}, which Hugging Face's ViT needs"
    if type(block.mlp.act) is not nn.GELU or block.mlp.act.approximate != "none":
        return f"has {type(block.mlp.act).__name__}, not GELU"
    if block.attn.attn_dim != vit.embed_dim:
        return "has heads that are not its width together"
    norms = {module.eps for module in vit.modules() if isinstance(module, nn.LayerNorm)}
    if len(norms) != 1:
        return "has norms of several epsilons"
    return None


def write(folder: Path, recipe: Recipe, student: Student, state: dict[str, Tensor]) -> None:
    """Writes model, tokeniser and image processor.

    Args:
        folder: an empty folder.
        student: the recipe's student, for what shapes don't tell; `unsupported` accepts it.
        state: the weights by aclip's names.
    """
    build_model(recipe, student, state).save_pretrained(folder)
    tokenizer = build_tokenizer(recipe.model.text.context_length)
    processor = VisionTextDualEncoderProcessor(build_image_processor(recipe), tokenizer)
    processor.save_pretrained(folder)


def build_model(
    recipe: Recipe, student: Student, state: dict[str, Tensor]
) -> VisionTextDualEncoderModel:
    """The dual encoder with the weights of a state with aclip's names; to be saved, not called,
    since its constant buffers are on the meta device."""
    vit, text = student.image.vit, student.text.transformer
    block = vit.blocks[0]
    vision_config = ViTConfig(
        hidden_size=vit.embed_dim,
        num_hidden_layers=len(vit.blocks),
        num_attention_heads=student.image.num_heads,
        intermediate_size=block.mlp.fc1.out_features,
        image_size=recipe.model.image.resolution,
        patch_size=student.image.patch_size,
        layer_norm_eps=vit.norm.eps,
        qkv_bias=block.attn.qkv.bias is not None,
        # The pooler is the identity; its default, tanh, would be silently wrong.
        pooler_act="linear",
    )
    scale = state[LOGIT_SCALE].reshape(())
    config = VisionTextDualEncoderConfig(
        vision_config=vision_config.to_dict(),
        text_config=text.config.to_dict(),
        projection_dim=recipe.model.embed_dim,
        logit_scale_init_value=scale.item(),
    )
    with torch.device("meta"):
        model = VisionTextDualEncoderModel(config)
    theirs = to_huggingface(state)
    theirs["vision_model.pooler.dense.weight"] = torch.eye(vit.embed_dim)
    theirs["vision_model.pooler.dense.bias"] = torch.zeros(vit.embed_dim)
    model.load_state_dict(theirs, assign=True)
    return model


def to_huggingface(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The model's tensors but the pooler, out of a state with aclip's names."""
    theirs = {}
    for name, tensor in state.items():
        if name.startswith(_VIT):
            parts = _convert_vit(name.removeprefix(_VIT), tensor)
            theirs |= {f"vision_model.{key}": part for key, part in parts.items()}
        elif name.startswith(PREFIX):
            theirs["text_model." + name.removeprefix(PREFIX)] = tensor
    theirs["visual_projection.weight"] = state["image_projection.weight"]
    theirs["text_projection.weight"] = state[TEXT_PROJECTION]
    theirs["logit_scale"] = state[LOGIT_SCALE].reshape(())
    return theirs


def _convert_vit(name: str, tensor: Tensor | None) -> dict[str, Tensor | None] | None:
    """One tensor of timm's ViT in ViTModel's names; None if it has no place there."""
    if name in _VIT_ONCE:
        return {_VIT_ONCE[name]: tensor}
    match = _BLOCK_KEY.fullmatch(name)
    if match is None:
        return None
    block, module, kind = match.groups()
    if module == "attn.qkv":
        # Copies: what shares memory can't be saved.
        parts = (None,) * 3 if tensor is None else (part.clone() for part in tensor.chunk(3))
        return {
            f"layers.{block}.attention.{key}.{kind}": part
            for key, part in zip(_QKV, parts, strict=True)
        }
    if module not in _IN_BLOCK:
        return None
    return {f"layers.{block}.{_IN_BLOCK[module]}.{kind}": tensor}


def build_image_processor(recipe: Recipe) -> CLIPImageProcessor:
    """aclip's evaluation preprocessing: shorter side, centre, bilinear.

    It cuts the centre rounding down where torchvision, open_clip and aclip round to even: where the
    longer side, resized, exceeds the resolution by 3 modulo 4, its square lies one pixel further
    to the left or top.
    """
    side = recipe.model.image.resolution
    return CLIPImageProcessor(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        resample=2,  # bilinear
        image_mean=list(recipe.augment.mean),
        image_std=list(recipe.augment.std),
    )
