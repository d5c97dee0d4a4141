"""The towers equal plain timm and transformers forwards: outputs and gradients.

The plain side runs the libraries' own forwards: every token through every block, padding included,
and dropped patches removed from the sequence by hand.
"""

import pytest
import timm
import torch
from transformers import CLIPTextModel

from aclip.errors import ConfigError
from aclip.masking import Selection
from aclip.models.text import END_TOKEN, START_TOKEN, TextTower
from aclip.models.vit import ImageTower

# Real widths and depths; few patches and, for base and large, fewer blocks keep this quick.
TOWERS = [
    pytest.param("vit_tiny_patch16_224", 64, {}, id="tiny, 12 blocks"),
    pytest.param("vit_base_patch16_224", 64, {"depth": 3}, id="base, 3 blocks"),
    pytest.param("vit_large_patch16_224", 64, {"depth": 2}, id="large, 2 blocks"),
    pytest.param("vit_tiny_patch16_224", 64, {"qk_norm": True, "init_values": 0.1}, id="qk_norm"),
    pytest.param("vit_base_patch16_clip_224", 32, {"depth": 2}, id="pre-norm"),
    pytest.param("vit_tiny_patch16_224", 56, {"patch_size": 14, "depth": 2}, id="patch 14"),
]
KEPT_BLOCKS = 3


def _towers(name, resolution, kwargs):
    torch.manual_seed(0)
    tower = ImageTower(name, resolution, kwargs, freeze_patch_embed=False).eval()
    plain = timm.create_model(name, num_classes=0, img_size=resolution, **kwargs).eval()
    plain.load_state_dict(tower.vit.state_dict())
    return tower, plain


def _compare(actual, expected, tower, plain):
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


@pytest.mark.parametrize("name, resolution, kwargs", TOWERS)
def test_all_patches_equal_timm_forward(name, resolution, kwargs):
    tower, plain = _towers(name, resolution, kwargs)
    pixels = torch.randn(2, 3, resolution, resolution)
    _compare(tower(pixels), plain(pixels), tower.vit, plain)


@pytest.mark.parametrize("name, resolution, kwargs", TOWERS)
def test_kept_patches_equal_timm_blocks_on_removed_tokens(name, resolution, kwargs):
    tower, plain = _towers(name, resolution, kwargs)
    grid = tower.grid
    pixels = torch.randn(4, 3, resolution, resolution)  # two samples, two views
    block_size = 1 if grid < 4 else 2
    scores = torch.rand(2, 2, grid, grid)
    tower_out = tower(pixels, Selection(scores, None, None, KEPT_BLOCKS, block_size))

    expected = []
    for row, view_scores in enumerate(scores.flatten(0, 1)):
        side = grid // block_size
        blocks = view_scores.view(side, block_size, side, block_size).mean((1, 3)).flatten()
        kept = sorted(range(side * side), key=lambda i, b=blocks: -b[i].item())[:KEPT_BLOCKS]
        ids = [
            (block // side * block_size + dy) * grid + block % side * block_size + dx
            for block in kept
            for dy in range(block_size)
            for dx in range(block_size)
        ]
        tokens = plain._pos_embed(plain.patch_embed(pixels[row : row + 1]))
        x = plain.norm_pre(tokens[:, [0] + [1 + i for i in sorted(ids)]])
        expected.append(plain.norm(plain.blocks(x))[:, 0])
    _compare(tower_out, torch.cat(expected), tower.vit, plain)


def test_scores_equal_mean_of_full_attention_matrices():
    tower, plain = _towers("vit_tiny_patch16_224", 64, {"depth": 3})
    pixels = torch.randn(2, 3, 64, 64)
    features, scores = tower.forward_with_scores(pixels)
    x = plain.norm_pre(plain._pos_embed(plain.patch_embed(pixels)))
    rows = []
    for block in plain.blocks:
        b, n, _ = x.shape
        qkv = block.attn.qkv(block.norm1(x)).reshape(b, n, 3, 3, 64).permute(2, 0, 3, 1, 4)
        attention = (qkv[0] @ qkv[1].transpose(-2, -1) * 64**-0.5).softmax(-1)  # (B, H, N, N)
        rows.append(attention[:, :, 0, 1:].mean(1))
        x = block(x)
    expected = torch.stack(rows).mean(0).view(2, 4, 4)
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(features, plain.norm(x)[:, 0], rtol=1e-5, atol=1e-5)


def test_teacher_view_at_half_resolution_gives_half_the_grid():
    tower, _ = _towers("vit_tiny_patch16_224", 64, {"depth": 2})
    _, scores = tower.forward_with_scores(torch.randn(2, 3, 32, 32))
    assert scores.shape == (2, 2, 2)


def test_checkpointed_activations_change_no_gradient():
    torch.manual_seed(0)
    plain = ImageTower("vit_tiny_patch16_224", 32, {"depth": 3})
    recomputed = ImageTower("vit_tiny_patch16_224", 32, {"depth": 3}, checkpoint_activations=True)
    recomputed.load_state_dict(plain.state_dict())
    pixels = torch.randn(2, 3, 32, 32)
    for tower in (plain, recomputed):
        tower(pixels).square().sum().backward()
    for a, b in zip(plain.parameters(), recomputed.parameters(), strict=True):
        if a.requires_grad:
            torch.testing.assert_close(a.grad, b.grad)


def test_frozen_patch_embedding_gets_no_gradient():
    tower = ImageTower("vit_tiny_patch16_224", 32, {"depth": 1})
    tower(torch.randn(1, 3, 32, 32)).sum().backward()
    assert tower.vit.patch_embed.proj.weight.grad is None
    assert tower.vit.pos_embed.grad is not None


def test_captions_cut_behind_their_end_equal_padded_transformers_forward():
    torch.manual_seed(0)
    tower = TextTower(width=64, heads=4, layers=3, context_length=20)
    plain = CLIPTextModel(tower.transformer.config)
    plain.load_state_dict(tower.transformer.state_dict())
    tokens = torch.zeros(3, 20, dtype=torch.int64)
    for row, length in enumerate((4, 9, 6)):
        tokens[row, :length] = torch.randint(1, 1000, (length,))
        tokens[row, 0], tokens[row, length - 1] = START_TOKEN, END_TOKEN
    hidden = plain(input_ids=tokens).last_hidden_state
    expected = hidden[torch.arange(3), torch.tensor([3, 8, 5])]
    _compare(tower(tokens[:, :9]), expected, tower.transformer, plain)


@pytest.mark.parametrize(
    "name, kwargs, words",
    [
        ("resnet50", {}, "ResNet"),
        ("no_such_model", {}, "does not know"),
        ("vit_small_patch16_224", {"class_token": False, "global_pool": "avg"}, "prefix tokens"),
        ("vit_small_patch16_224", {"reg_tokens": 4}, "prefix tokens"),
        ("vit_small_patch16_224", {"no_such_argument": 4}, "no_such_argument"),
        ("vit_small_patch16_224", {"patch_size": 7}, "patches of 7"),
    ],
)
def test_unsupported_tower_is_refused_in_one_sentence(name, kwargs, words):
    with pytest.raises(ConfigError, match=words) as caught:
        ImageTower(name, 64, kwargs)
    assert "\n" not in str(caught.value)
