"""The text tower equals transformers' plain forward: outputs and gradients.

The plain side runs every token through every block, padding included.
"""

import pytest
import torch
from plain_towers import compare
from transformers import CLIPTextModel

from aclip.method.tokens import END_ID, START_ID, Tokens, clip_tokens
from aclip.models.text import TextTower

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
    compare(tower(cut), expected, tower.transformer, plain)
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
    compare(features[real], expected[real], tower.transformer, plain)


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
    tower(clip_tokens(_captions((4, 9)))).square().sum().backward()
    assert all(parameter.grad is not None for parameter in tower.parameters())
    last = tower.transformer.encoder.layers[-1].self_attn
    assert not last.k_proj.bias.grad.any() and last.v_proj.bias.grad.any()


def test_text_tower_in_bf16_stays_near_fp32():
    tower, _ = _text_towers()
    tokens = clip_tokens(_captions((7, 2, 13)))
    expected = tower(tokens)
    in_bf16 = tower.to(torch.bfloat16)(tokens)
    assert in_bf16.dtype == torch.bfloat16
    # Features are of size one; bf16 keeps 8 bits and three layers add up.
    assert (in_bf16.float() - expected).abs().max() < 0.1
    in_bf16.float().square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in tower.parameters())
