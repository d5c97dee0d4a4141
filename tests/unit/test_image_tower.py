"""The image tower equals timm's plain forward: outputs and gradients.

The plain side runs every token through every block, and dropped patches are removed from the
sequence by hand.
"""

import pytest
import timm
import torch
from plain_towers import compare

from aclip.errors import ConfigError
from aclip.method.masks.policy import Selection
from aclip.models.vit import ImageTower

# Real widths and depths; few patches and, for base and large, fewer blocks keep this quick.
TOWERS = [
    pytest.param("vit_tiny_patch16_224", 64, {}, id="tiny, 12 blocks"),
    pytest.param("vit_base_patch16_224", 64, {"depth": 3}, id="base, 3 blocks"),
    pytest.param("vit_large_patch16_224", 64, {"depth": 2}, id="large, 2 blocks"),
    pytest.param("vit_tiny_patch16_224", 64, {"qk_norm": True, "init_values": 0.1}, id="qk_norm"),
    pytest.param("vit_tiny_patch16_224", 48, {"qkv_bias": False, "depth": 2}, id="no qkv bias"),
    pytest.param("vit_base_patch16_clip_224", 32, {"depth": 2}, id="pre-norm"),
    pytest.param("vit_tiny_patch16_224", 56, {"patch_size": 14, "depth": 2}, id="patch 14"),
]
KEPT_BLOCKS = 3


def _towers(name, resolution, kwargs):
    torch.manual_seed(0)
    tower = ImageTower(name, resolution, kwargs, freeze_patch_embed=False).eval()
    for parameter_name, parameter in tower.named_parameters():
        if parameter_name.endswith("bias"):  # timm starts them at zero, which would hide them
            torch.nn.init.normal_(parameter, std=0.5)
    plain = timm.create_model(name, num_classes=0, img_size=resolution, **kwargs).eval()
    plain.load_state_dict(tower.vit.state_dict())
    return tower, plain


@pytest.mark.parametrize("name, resolution, kwargs", TOWERS)
def test_all_patches_equal_timm_forward(name, resolution, kwargs):
    tower, plain = _towers(name, resolution, kwargs)
    pixels = torch.randn(2, 3, resolution, resolution)
    compare(tower(pixels), plain(pixels), tower.vit, plain)


@pytest.mark.parametrize("name, resolution, kwargs", TOWERS)
def test_kept_patches_equal_timm_blocks_on_removed_tokens(name, resolution, kwargs):
    tower, plain = _towers(name, resolution, kwargs)
    grid = tower.grid
    pixels = torch.randn(4, 3, resolution, resolution)  # two samples, two views
    block_size = 1 if grid < 4 else 2
    scores = torch.rand(2, 2, grid, grid)
    tower_out = tower(pixels, Selection(scores, None, None, KEPT_BLOCKS, block_size))
    ids = _kept_ids(scores.flatten(0, 1), block_size)
    compare(tower_out, _plain_on_kept(plain, pixels, ids)[:, 0], tower.vit, plain)


@pytest.mark.parametrize("name, resolution, kwargs", TOWERS)
def test_features_of_all_tokens_equal_timm_blocks(name, resolution, kwargs):
    tower, plain = _towers(name, resolution, kwargs)
    pixels = torch.randn(2, 3, resolution, resolution)
    tokens, keep_ids = tower.forward_patches(pixels)
    assert keep_ids is None
    compare(tokens, plain.forward_features(pixels), tower.vit, plain)

    grid = tower.grid
    block_size = 2 if grid % 2 == 0 else 1
    scores = torch.rand(1, 2, grid, grid)
    ids = _kept_ids(scores[0], block_size)[:, : KEPT_BLOCKS * block_size**2]
    with torch.no_grad():
        kept = min(KEPT_BLOCKS, (grid // block_size) ** 2)
        selection = Selection(scores, None, None, kept, block_size)
        tokens, keep_ids = tower.forward_patches(pixels, selection)
        assert torch.equal(keep_ids, ids)
        expected = _plain_on_kept(plain, pixels, ids)
        torch.testing.assert_close(tokens, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(tower(pixels, selection), tokens[:, 0], rtol=1e-5, atol=1e-5)


def _kept_ids(scores, block_size):
    """(M, K) ids of the KEPT_BLOCKS best blocks of (M, G, G) scores, one row after the other."""
    rows = []
    for view_scores in scores:
        grid = len(view_scores)
        side = grid // block_size
        blocks = view_scores.view(side, block_size, side, block_size).mean((1, 3)).flatten()
        kept = sorted(range(side * side), key=lambda i, b=blocks: -b[i].item())[:KEPT_BLOCKS]
        rows.append(
            sorted(
                (block // side * block_size + dy) * grid + block % side * block_size + dx
                for block in kept
                for dy in range(block_size)
                for dx in range(block_size)
            )
        )
    return torch.tensor(rows)


def _plain_on_kept(plain, pixels, ids):
    """timm's blocks on the CLS token and the kept patches of each image: (M, 1 + K, C)."""
    tokens = plain._pos_embed(plain.patch_embed(pixels))
    rows = [
        row[[0] + [1 + i for i in kept]] for row, kept in zip(tokens, ids.tolist(), strict=True)
    ]
    return plain.norm(plain.blocks(plain.norm_pre(torch.stack(rows))))


@pytest.mark.parametrize("qk_norm", [False, True])
def test_scores_equal_mean_of_full_attention_matrices(qk_norm):
    tower, plain = _towers("vit_tiny_patch16_224", 64, {"depth": 3, "qk_norm": qk_norm})
    pixels = torch.randn(2, 3, 64, 64)
    features, scores = tower.forward_with_scores(pixels)
    x = plain.norm_pre(plain._pos_embed(plain.patch_embed(pixels)))
    rows = []
    for block in plain.blocks:
        b, n, _ = x.shape
        qkv = block.attn.qkv(block.norm1(x)).reshape(b, n, 3, 3, 64).permute(2, 0, 3, 1, 4)
        q, k = block.attn.q_norm(qkv[0]), block.attn.k_norm(qkv[1])
        attention = (q @ k.transpose(-2, -1) * 64**-0.5).softmax(-1)  # (B, H, N, N)
        rows.append(attention[:, :, 0, 1:].mean(1))
        x = block(x)
    expected = torch.stack(rows).mean(0).view(2, 4, 4)
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(features, plain.norm(x)[:, 0], rtol=1e-5, atol=1e-5)


def test_teacher_view_at_half_resolution_gives_half_the_grid():
    tower, _ = _towers("vit_tiny_patch16_224", 64, {"depth": 2})
    _, scores = tower.forward_with_scores(torch.randn(2, 3, 32, 32))
    assert scores.shape == (2, 2, 2)


def test_last_key_bias_gets_a_gradient_of_zero():
    tower, _ = _towers("vit_tiny_patch16_224", 32, {"depth": 2})
    tower(torch.randn(2, 3, 32, 32)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in tower.parameters())
    query, key, value = tower.vit.blocks[-1].attn.qkv.bias.grad.chunk(3)
    assert query.any() and not key.any() and value.any()


def test_attention_of_the_last_block_is_dropped_while_training_only():
    tower, _ = _towers("vit_tiny_patch16_224", 32, {"depth": 1, "attn_drop_rate": 0.5})
    pixels = torch.randn(2, 3, 32, 32)
    assert not torch.equal(tower.train()(pixels), tower(pixels))
    assert torch.equal(tower.eval()(pixels), tower(pixels))


def test_image_tower_in_bf16_stays_near_fp32():
    tower, _ = _towers("vit_tiny_patch16_224", 64, {"depth": 3})
    pixels = torch.randn(2, 3, 64, 64)
    features, scores = tower.forward_with_scores(pixels)
    features_bf16, scores_bf16 = tower.to(torch.bfloat16).forward_with_scores(pixels.bfloat16())
    assert features_bf16.dtype == torch.bfloat16 and scores_bf16.dtype == torch.float32
    # Features are of size one; bf16 keeps 8 bits and three blocks add up.
    assert (features_bf16.float() - features).abs().max() < 0.1
    torch.testing.assert_close(scores_bf16, scores, rtol=0.03, atol=1e-4)
    tower(pixels.bfloat16()).float().square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in tower.parameters())


def test_frozen_patch_embedding_gets_no_gradient():
    tower = ImageTower("vit_tiny_patch16_224", 32, {"depth": 1})
    tower(torch.randn(1, 3, 32, 32)).sum().backward()
    assert tower.vit.patch_embed.proj.weight.grad is None
    assert tower.vit.pos_embed.grad is not None


@pytest.mark.parametrize(
    "name, kwargs, words",
    [
        ("resnet50", {}, "ResNet"),
        ("no_such_model", {}, "does not know"),
        ("vit_small_patch16_224", {"class_token": False, "global_pool": "avg"}, "prefix tokens"),
        ("vit_small_patch16_224", {"reg_tokens": 4}, "prefix tokens"),
        ("vit_small_patch16_224", {"no_such_argument": 4}, "no_such_argument"),
        ("vit_small_patch16_224", {"patch_size": 7}, "patches of 7"),
        ("vit_small_patch16_224", {"patch_drop_rate": 0.5}, "drops patches"),
        ("vit_small_patch16_224", {"drop_rate": 0.1}, "drops patches"),
    ],
)
def test_unsupported_tower_is_refused_in_one_sentence(name, kwargs, words):
    with pytest.raises(ConfigError, match=words) as caught:
        ImageTower(name, 64, kwargs)
    assert "\n" not in str(caught.value)
