"""Towers beside the libraries' own models of the same weights."""

import timm
import torch
from transformers import CLIPTextModel

from aclip.method.tokens import END_ID, START_ID
from aclip.models.text import TextTower
from aclip.models.vit import ImageTower

CONTEXT = 20


def image_towers(name, resolution, kwargs):
    """The image tower, and timm's model with its weights."""
    torch.manual_seed(0)
    tower = ImageTower(name, resolution, kwargs, freeze_patch_embed=False).eval()
    for parameter_name, parameter in tower.named_parameters():
        if parameter_name.endswith("bias"):  # timm starts them at zero, which would hide them
            torch.nn.init.normal_(parameter, std=0.5)
    plain = timm.create_model(name, num_classes=0, img_size=resolution, **kwargs).eval()
    plain.load_state_dict(tower.vit.state_dict())
    return tower, plain


def text_towers(layers=3, dtype=torch.float32):
    """The text tower, and transformers' model with its weights."""
    torch.manual_seed(0)
    tower = TextTower(width=64, heads=4, layers=layers, context_length=CONTEXT)
    for name, parameter in tower.named_parameters():
        if name.endswith("bias"):  # transformers starts them at zero, which would hide them
            torch.nn.init.normal_(parameter, std=0.5)
    tower = tower.to(dtype)
    plain = CLIPTextModel(tower.transformer.config).to(dtype)
    plain.load_state_dict(tower.transformer.state_dict())
    return tower, plain


def captions(lengths):
    """(B, context) int64; id 0 is also a word, so padding can't be told by it."""
    tokens = torch.zeros(len(lengths), CONTEXT, dtype=torch.int64)
    for row, length in enumerate(lengths):
        tokens[row, :length] = torch.randint(0, 1000, (length,))
        tokens[row, 1:2] = 0
        tokens[row, 0], tokens[row, length - 1] = START_ID, END_ID
    return tokens


def compare(actual, expected, tower, plain):
    """The outputs are equal, and so is the gradient of each of the tower's parameters."""
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    weight = torch.randn_like(expected)
    (actual * weight).sum().backward()
    (expected * weight).sum().backward()
    gradients = dict(plain.named_parameters())
    compared = 0
    for name, parameter in tower.named_parameters():
        expected_gradient = gradients[name].grad
        if expected_gradient is None:
            assert parameter.grad is None or not parameter.grad.any()
            continue
        # A key bias has no gradient but rounding: softmax does not see it. Hence the floor.
        scale = expected_gradient.abs().max()
        assert (parameter.grad - expected_gradient).abs().max() <= 1e-4 * scale + 1e-6, name
        compared += 1
    assert compared > 5
