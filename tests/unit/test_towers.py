"""The towers equal plain timm and transformers forwards: outputs and gradients.

The plain side runs the libraries' own forwards: every token through every block, padding included,
and dropped patches removed from the sequence by hand.
"""

import pytest
import timm
import torch
from transformers import CLIPTextModel

from aclip.errors import ConfigError
from aclip.method.masks.policy import Selection
from aclip.method.tokens import END_ID, START_ID, Tokens, clip_tokens
from aclip.models.text import TextTower
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
    ids = _kept_ids(scores.flatten(0, 1), block_size)
    _compare(tower_out, _plain_on_kept(plain, pixels, ids)[:, 0], tower.vit, plain)


@pytest.mark.parametrize("name, resolution, kwargs", TOWERS)
def test_features_of_all_tokens_equal_timm_blocks(name, resolution, kwargs):
    tower, plain = _towers(name, resolution, kwargs)
    pixels = torch.randn(2, 3, resolution, resolution)
    tokens, keep_ids = tower.forward_patches(pixels)
    assert keep_ids is None
    _compare(tokens, plain.forward_features(pixels), tower.vit, plain)

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


# Lengths of the captions of a batch; two is a caption without words.
LENGTHS = [
    pytest.param((4, 9, 6), id="odd lengths"),
    pytest.param((7, 2, 13, 2, 5), id="two tokens"),
    pytest.param((11,), id="one row"),
    pytest.param((2,), id="one row of two tokens"),
    pytest.param((8, 8, 8), id="all the same"),
    pytest.param((20, 3), id="whole context"),
]
CONTEXT = 20


def _captions(lengths):
    """(B, context) int64; id 0 is also a word, so padding can't be told by it."""
    tokens = torch.zeros(len(lengths), CONTEXT, dtype=torch.int64)
    for row, length in enumerate(lengths):
        tokens[row, :length] = torch.randint(0, 1000, (length,))
        tokens[row, 1:2] = 0
        tokens[row, 0], tokens[row, length - 1] = START_ID, END_ID
    return tokens


def _text_towers(layers=3, dtype=torch.float32):
    torch.manual_seed(0)
    tower = TextTower(width=64, heads=4, layers=layers, context_length=CONTEXT)
    for name, parameter in tower.named_parameters():
        if name.endswith("bias"):  # transformers starts them at zero, which would hide them
            torch.nn.init.normal_(parameter, std=0.5)
    tower = tower.to(dtype)
    plain = CLIPTextModel(tower.transformer.config).to(dtype)
    plain.load_state_dict(tower.transformer.state_dict())
    return tower, plain


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_packed_captions_equal_padded_transformers_forward(lengths, layers):
    tower, plain = _text_towers(layers)
    tokens = _captions(lengths)
    hidden = plain(input_ids=tokens).last_hidden_state
    expected = hidden[torch.arange(len(lengths)), torch.tensor(lengths) - 1]
    cut = clip_tokens(tokens)
    _compare(tower(cut), expected, tower.transformer, plain)
    with torch.no_grad():
        given = tower(cut.located())
        torch.testing.assert_close(given, tower(cut), rtol=0, atol=0)
        padded = tower(Tokens(tokens, cut.lengths))
        torch.testing.assert_close(padded, given, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lengths", LENGTHS)
def test_real_tokens_are_those_up_to_the_end_token(lengths):
    expected = [row * CONTEXT + column for row, n in enumerate(lengths) for column in range(n)]
    tokens = Tokens(_captions(lengths), torch.tensor(lengths))
    assert tokens.located().real_ids.tolist() == expected
    assert clip_tokens(tokens.ids).lengths.tolist() == list(lengths)


@pytest.mark.parametrize("lengths", LENGTHS)
def test_features_of_all_tokens_equal_transformers_forward(lengths):
    tower, plain = _text_towers()
    tokens = _captions(lengths)[:, : max(lengths)]
    real = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
    features = tower.forward_tokens(clip_tokens(tokens))
    assert features.shape == (*tokens.shape, 64) and features.isfinite().all()
    expected = plain(input_ids=tokens).last_hidden_state
    _compare(features[real], expected[real], tower.transformer, plain)


def test_masked_tokens_read_the_mask_token_at_their_position():
    tower, plain = _text_towers()
    tokens = _captions((4, 9, 6))[:, :9]
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


def test_every_text_parameter_gets_a_gradient_and_the_last_key_bias_zero():
    tower, _ = _text_towers()
    tower(_captions((4, 9))).square().sum().backward()
    assert all(parameter.grad is not None for parameter in tower.parameters())
    last = tower.transformer.encoder.layers[-1].self_attn
    assert not last.k_proj.bias.grad.any() and last.v_proj.bias.grad.any()


def test_text_tower_in_bf16_stays_near_fp32():
    tower, _ = _text_towers()
    tokens = _captions((7, 2, 13))
    expected = tower(tokens)
    in_bf16 = tower.to(torch.bfloat16)(tokens)
    assert in_bf16.dtype == torch.bfloat16
    # Features are of size one; bf16 keeps 8 bits and three layers add up.
    assert (in_bf16.float() - expected).abs().max() < 0.1
    in_bf16.float().square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in tower.parameters())


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
