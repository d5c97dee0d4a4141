"""The towers equal plain timm and transformers forwards: outputs and gradients.

The plain side runs the libraries' own forwards: every token through every block, padding included,
and dropped patches removed from the sequence by hand.
"""

import pytest
import torch
from plain_towers import CONTEXT, captions, compare, image_towers, text_towers
from small_recipe import SMALL_RECIPE

from aclip.config.recipe_file import load_recipe
from aclip.errors import ConfigError
from aclip.method.masks.policy import Selection
from aclip.method.tokens import Tokens, clip_tokens
from aclip.models.student import build_student
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


@pytest.mark.parametrize("name, resolution, kwargs", TOWERS)
def test_all_patches_equal_timm_forward(name, resolution, kwargs):
    tower, plain = image_towers(name, resolution, kwargs)
    pixels = torch.randn(2, 3, resolution, resolution)
    compare(tower(pixels), plain(pixels), tower.vit, plain)


@pytest.mark.parametrize("name, resolution, kwargs", TOWERS)
def test_kept_patches_equal_timm_blocks_on_removed_tokens(name, resolution, kwargs):
    tower, plain = image_towers(name, resolution, kwargs)
    grid = tower.grid
    pixels = torch.randn(4, 3, resolution, resolution)  # two samples, two views
    block_size = 1 if grid < 4 else 2
    scores = torch.rand(2, 2, grid, grid)
    tower_out = tower(pixels, Selection(scores, None, None, KEPT_BLOCKS, block_size))
    ids = _kept_ids(scores.flatten(0, 1), block_size)
    compare(tower_out, _plain_on_kept(plain, pixels, ids)[:, 0], tower.vit, plain)


@pytest.mark.parametrize("name, resolution, kwargs", TOWERS)
def test_features_of_all_tokens_equal_timm_blocks(name, resolution, kwargs):
    tower, plain = image_towers(name, resolution, kwargs)
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


@pytest.mark.parametrize("score_layers", [None, 1, 2, 3])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_scores_equal_mean_of_full_attention_matrices(qk_norm, score_layers):
    tower, plain = image_towers("vit_tiny_patch16_224", 64, {"depth": 3, "qk_norm": qk_norm})
    pixels = torch.randn(2, 3, 64, 64)
    features, scores = tower.forward_with_scores(pixels, score_layers)
    x = plain.norm_pre(plain._pos_embed(plain.patch_embed(pixels)))
    rows = []
    for block in plain.blocks:
        b, n, _ = x.shape
        qkv = block.attn.qkv(block.norm1(x)).reshape(b, n, 3, 3, 64).permute(2, 0, 3, 1, 4)
        q, k = block.attn.q_norm(qkv[0]), block.attn.k_norm(qkv[1])
        attention = (q @ k.transpose(-2, -1) * 64**-0.5).softmax(-1)  # (B, H, N, N)
        rows.append(attention[:, :, 0, 1:].mean(1))
        x = block(x)
    expected = torch.stack(rows[:score_layers]).mean(0).view(2, 4, 4)
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(features, plain.norm(x)[:, 0], rtol=1e-5, atol=1e-5)
    # Without features: the blocks behind are not even looked at.
    del tower.vit.blocks[score_layers or 3 :], tower.vit.norm
    alone = tower.forward_with_scores(pixels, score_layers, with_features=False)
    assert alone[0] is None
    torch.testing.assert_close(alone[1], expected, rtol=1e-5, atol=1e-6)


def test_teacher_view_at_half_resolution_gives_half_the_grid():
    tower, _ = image_towers("vit_tiny_patch16_224", 64, {"depth": 2})
    _, scores = tower.forward_with_scores(torch.randn(2, 3, 32, 32))
    assert scores.shape == (2, 2, 2)


# Lengths of the captions of a batch; two is a caption without words.
LENGTHS = [
    pytest.param((4, 9, 6), id="odd lengths"),
    pytest.param((7, 2, 13, 2, 5), id="two tokens"),
    pytest.param((11,), id="one row"),
    pytest.param((2,), id="one row of two tokens"),
    pytest.param((8, 8, 8), id="all the same"),
    pytest.param((20, 3), id="whole context"),
]


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_packed_captions_equal_padded_transformers_forward(lengths, layers):
    tower, plain = text_towers(layers)
    tokens = captions(lengths)
    hidden = plain(input_ids=tokens).last_hidden_state
    expected = hidden[torch.arange(len(lengths)), torch.tensor(lengths) - 1]
    cut = clip_tokens(tokens)
    compare(tower(cut), expected, tower.transformer, plain)
    with torch.no_grad():
        given = tower(cut.located())
        torch.testing.assert_close(given, tower(cut), rtol=0, atol=0)
        padded = tower(Tokens(tokens, cut.lengths))
        torch.testing.assert_close(padded, given, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lengths", LENGTHS)
def test_real_tokens_are_those_up_to_the_end_token(lengths):
    expected = [row * CONTEXT + column for row, n in enumerate(lengths) for column in range(n)]
    tokens = Tokens(captions(lengths), torch.tensor(lengths))
    assert tokens.located().real_ids.tolist() == expected
    assert clip_tokens(tokens.ids).lengths.tolist() == list(lengths)


@pytest.mark.parametrize("lengths", LENGTHS)
def test_features_of_all_tokens_equal_transformers_forward(lengths):
    tower, plain = text_towers()
    tokens = captions(lengths)[:, : max(lengths)]
    real = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
    features = tower.forward_tokens(clip_tokens(tokens))
    assert features.shape == (*tokens.shape, 64) and features.isfinite().all()
    expected = plain(input_ids=tokens).last_hidden_state
    compare(features[real], expected[real], tower.transformer, plain)


def test_masked_tokens_read_the_mask_token_at_their_position():
    tower, plain = text_towers()
    tokens = captions((4, 9, 6))[:, :9]
    masked = torch.zeros(tokens.shape, dtype=torch.bool)
    masked[0, 2] = masked[1, 3] = masked[1, 7] = masked[2, 8] = True  # the last is padding
    mask_token = torch.randn(64, requires_grad=True)
    real = torch.arange(9) < torch.tensor((4, 9, 6)).unsqueeze(1)
    features = tower.forward_tokens(clip_tokens(tokens), masked, mask_token)[real]

    # A word of the plain model that embeds like the mask token.
    with torch.no_grad():
        plain.embeddings.token_embedding.weight[1234] = mask_token
    hidden = plain(input_ids=tokens.masked_fill(masked & real, 1234)).last_hidden_state
    torch.testing.assert_close(features, hidden[real], rtol=1e-5, atol=1e-5)
    weight = torch.randn_like(features)
    (features * weight).sum().backward()
    (hidden[real] * weight).sum().backward()
    of_words = plain.embeddings.token_embedding.weight.grad
    torch.testing.assert_close(mask_token.grad, of_words[1234], rtol=1e-4, atol=1e-6)
    of_words[1234] = 0
    own = tower.transformer.embeddings.token_embedding.weight.grad
    torch.testing.assert_close(own, of_words, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "override, sentence",
    [
        ("teacher.score_layers=5", "score_layers is 5, .* has 4 blocks; give 4 or less"),
        ("teacher.resolution=60", "resolution is 60, which patches of 8 px do not divide"),
        ("mask.block_size=3", "block_size is 3, which does not divide the 8 patches per side"),
    ],
)
def test_mask_that_does_not_fit_the_image_tower_is_refused(override, sentence):
    with pytest.raises(ConfigError, match=sentence), torch.device("meta"):
        build_student(load_recipe(SMALL_RECIPE, [override]))


@pytest.mark.parametrize(
    "name, kwargs, words",
    [
        ("resnet50", {}, "ResNet"),
        ("no_such_model", {}, "does not know"),
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
