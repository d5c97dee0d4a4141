"""The text tower as OpenAI's CLIP lays it out, which open_clip, SLIP and A-CLIP share.

W width, L context length, E joint embedding.
"""

import re

import torch
from torch import Tensor

PREFIX = "text.transformer."
TEXT_PROJECTION = "text_projection.weight"
_ONCE = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
_IN_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_QKV = ("q_proj", "k_proj", "v_proj")
_LAYER_KEY = re.compile(r"transformer\.resblocks\.(\d+)\.(.+)[._](weight|bias)")


def from_clip_text(key: str, tensor: Tensor) -> dict[str, Tensor] | None:
    """What one tensor of the layout is in aclip's names; None if the key is not of the layout."""
    if key in _ONCE:
        return {PREFIX + _ONCE[key]: tensor}
    if key == "text_projection":
        return {TEXT_PROJECTION: transposed(tensor)}
    match = _LAYER_KEY.fullmatch(key)
    if match is None:
        return None
    layer, module, kind = match.groups()
    prefix = f"{PREFIX}encoder.layers.{layer}."
    if module == "attn.in_proj" and len(tensor) % 3 == 0:
        parts = tensor.chunk(3)
        return {
            f"{prefix}self_attn.{name}.{kind}": part for name, part in zip(_QKV, parts, strict=True)
        }
    if module not in _IN_LAYER:
        return None
    return {f"{prefix}{_IN_LAYER[module]}.{kind}": tensor}


def transposed(tensor: Tensor) -> Tensor:
    """A matrix transposed; anything else stays as it is, and its shape is refused later."""
    return tensor.t() if tensor.ndim == 2 else tensor


def to_clip_text(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The text tower and its projection, out of a state with aclip's names, in the layout."""
    theirs = {key: state[PREFIX + name] for key, name in _ONCE.items()}
    theirs["text_projection"] = state[TEXT_PROJECTION].t()
    norms = re.compile(re.escape(PREFIX) + r"encoder\.layers\.(\d+)\.layer_norm1\.weight")
    layers = [match[1] for match in map(norms.fullmatch, state) if match]
    for layer in layers:
        ours, prefix = f"{PREFIX}encoder.layers.{layer}.", f"transformer.resblocks.{layer}."
        for kind in ("weight", "bias"):
            parts = [state[f"{ours}self_attn.{name}.{kind}"] for name in _QKV]
            theirs[f"{prefix}attn.in_proj_{kind}"] = torch.cat(parts)
            for name, our_name in _IN_LAYER.items():
                theirs[f"{prefix}{name}.{kind}"] = state[f"{ours}{our_name}.{kind}"]
    return theirs
