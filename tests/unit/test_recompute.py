"""Recomputation changes what is kept for the backward pass and nothing else."""

import pytest
import torch
from saved_activations import saved_activation_bytes
from small_recipe import SMALL_RECIPE
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from aclip.config.recipe_file import load_recipe
from aclip.method.masks.policy import Selection
from aclip.method.tokens import END_ID, START_ID, clip_tokens
from aclip.models.recompute import applied
from aclip.models.student import build_student
from aclip.models.text import TextTower
from aclip.models.vit import ImageTower

MODES = ("none", "elementwise", "blocks")


class CountProducts(TorchDispatchMode):
    """Counts matrix products and attentions."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.count += any(part in name for part in ("mm", "scaled_dot", "linear"))
        return function(*args, **(kwargs or {}))


def _image(dtype=torch.float32, **kwargs):
    torch.manual_seed(0)
    tower = ImageTower("vit_tiny_patch16_224", 64, {"depth": 4, **kwargs}, False).to(dtype)
    pixels = torch.randn(4, 3, 64, 64, dtype=dtype)
    selection = Selection(torch.rand(2, 2, 4, 4), None, None, 3, 2)
    return tower, lambda: tower(pixels, selection)


def _text(dtype=torch.float32):
    torch.manual_seed(0)
    tower = TextTower(width=64, heads=4, layers=4, context_length=16).to(dtype)
    tokens = torch.zeros(3, 13, dtype=torch.int64)
    for row, length in enumerate((7, 2, 13)):
        tokens[row, :length] = torch.randint(0, 1000, (length,))
        tokens[row, 0], tokens[row, length - 1] = START_ID, END_ID
    return tower, lambda: tower(clip_tokens(tokens))


TOWERS = [
    pytest.param(_image, {}, id="image"),
    pytest.param(_image, {"qk_norm": True, "init_values": 0.1}, id="image, qk_norm, layer scale"),
    pytest.param(_image, {"scale_attn_norm": True, "scale_mlp_norm": True}, id="image, more norms"),
    pytest.param(_image, {"proj_drop_rate": 0.3, "attn_drop_rate": 0.3}, id="image, dropout"),
    pytest.param(_text, {}, id="text"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("build, kwargs", TOWERS)
def test_gradients_are_equal_bit_for_bit(build, kwargs, dtype):
    gradients = {}
    for mode in MODES:
        tower, forward = build(dtype, **kwargs)
        tower.recompute = mode
        torch.manual_seed(1)
        forward().float().sin().sum().backward()
        gradients[mode] = [parameter.grad for parameter in tower.parameters()]
    for mode in MODES[1:]:
        for expected, actual in zip(gradients["none"], gradients[mode], strict=True):
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("build", [_image, _text])
def test_elementwise_repeats_no_matrix_product(build):
    counts = {}
    for mode in MODES:
        tower, forward = build()
        tower.recompute = mode
        with CountProducts() as counter:
            forward().sum().backward()
        counts[mode] = counter.count
    assert counts["none"] == counts["elementwise"] < counts["blocks"]


# Of the captions, padded queries, keys, values and outputs are kept in both modes.
@pytest.mark.parametrize("build, most", [(_image, 0.7), (_text, 0.75)])
def test_less_is_kept(build, most):
    kept = {}
    for mode in MODES:
        tower, forward = build()
        tower.recompute = mode
        kept[mode] = saved_activation_bytes(forward, [tower])
    assert kept["blocks"] < 0.25 * kept["none"]
    assert 0.5 * kept["none"] < kept["elementwise"] < most * kept["none"]


def test_kept_bytes_of_known_layers():
    linear, norm = nn.Linear(6, 6), nn.LayerNorm(6)
    x = torch.randn(10, 6, requires_grad=True)
    row, statistics = 10 * 6 * 4, 10 * 4
    assert saved_activation_bytes(lambda: linear(x), [linear]) == row
    # x for two readers counts once; its square root is kept too.
    assert saved_activation_bytes(lambda: linear(x) + x.exp().sqrt(), [linear]) == 3 * row

    def norm_and_linear(mode):
        with applied(mode, norm, x) as normed:
            return linear(normed)

    kept = {
        mode: saved_activation_bytes(lambda mode=mode: norm_and_linear(mode), [linear, norm])
        for mode in ("none", "elementwise")
    }
    assert kept == {"none": 2 * row + 2 * statistics, "elementwise": row + 2 * statistics}


def test_recipe_sets_both_towers():
    overrides = ["model.image.recompute=blocks", "model.text.recompute=elementwise"]
    student = build_student(load_recipe(SMALL_RECIPE, overrides))
    assert (student.image.recompute, student.text.recompute) == ("blocks", "elementwise")
