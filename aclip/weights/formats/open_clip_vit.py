"""open_clip's and OpenAI's own image tower, which timm calls vit_..._clip.

A norm stands in front of its blocks.
"""

import re

from torch import Tensor

from aclip.weights.formats.clip_text import transposed

MARK = "visual.class_embedding"
"""A key that only this tower has."""
_VIT = "image.vit."
_ONCE = {
    "conv1.weight": "patch_embed.proj.weight",
    "ln_pre.weight": "norm_pre.weight",
    "ln_pre.bias": "norm_pre.bias",
    "ln_post.weight": "norm.weight",
    "ln_post.bias": "norm.bias",
}
_IN_BLOCK = {
    "ln_1.": "norm1.",
    "ln_2.": "norm2.",
    "attn.in_proj_": "attn.qkv.",
    "attn.out_proj.": "attn.proj.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
}
_BLOCK_KEY = re.compile(r"transformer\.resblocks\.(\d+)\.(.+[._])(weight|bias)")


def from_open_clip_vit(key: str, tensor: Tensor) -> dict[str, Tensor] | None:
    """What one tensor of the tower, named without `visual.`, is in aclip's names; None if it has no
    counterpart."""
    if key in _ONCE:
        return {_VIT + _ONCE[key]: tensor}
    if key == "class_embedding":
        return {f"{_VIT}cls_token": tensor.reshape(1, 1, -1)}
    if key == "positional_embedding":
        return {f"{_VIT}pos_embed": tensor.unsqueeze(0)}
    if key == "proj":
        return {"image_projection.weight": transposed(tensor)}
    match = _BLOCK_KEY.fullmatch(key)
    if match is None or match[2] not in _IN_BLOCK:
        return None
    return {f"{_VIT}blocks.{match[1]}.{_IN_BLOCK[match[2]]}{match[3]}": tensor}
