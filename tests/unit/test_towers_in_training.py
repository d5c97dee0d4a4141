"""The towers while they train: gradients of every parameter, dropout, bf16, frozen weights."""

import torch
from plain_towers import captions, image_towers, text_towers

from aclip.method.tokens import clip_tokens
from aclip.models.vit import ImageTower


def test_last_key_bias_gets_a_gradient_of_zero():
    tower, _ = image_towers("vit_tiny_patch16_224", 32, {"depth": 2})
    tower(torch.randn(2, 3, 32, 32)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in tower.parameters())
    query, key, value = tower.vit.blocks[-1].attn.qkv.bias.grad.chunk(3)
    assert query.any() and not key.any() and value.any()


def test_attention_of_the_last_block_is_dropped_while_training_only():
    tower, _ = image_towers("vit_tiny_patch16_224", 32, {"depth": 1, "attn_drop_rate": 0.5})
    pixels = torch.randn(2, 3, 32, 32)
    assert not torch.equal(tower.train()(pixels), tower(pixels))
    assert torch.equal(tower.eval()(pixels), tower(pixels))


def test_image_tower_in_bf16_stays_near_fp32():
    tower, _ = image_towers("vit_tiny_patch16_224", 64, {"depth": 3})
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


def test_every_text_parameter_gets_a_gradient_and_the_last_key_bias_zero():
    tower, _ = text_towers()
    tower(clip_tokens(captions((4, 9)))).square().sum().backward()
    assert all(parameter.grad is not None for parameter in tower.parameters())
    last = tower.transformer.encoder.layers[-1].self_attn
    assert not last.k_proj.bias.grad.any() and last.v_proj.bias.grad.any()


def test_text_tower_in_bf16_stays_near_fp32():
    tower, _ = text_towers()
    tokens = clip_tokens(captions((7, 2, 13)))
    expected = tower(tokens)
    in_bf16 = tower.to(torch.bfloat16)(tokens)
    assert in_bf16.dtype == torch.bfloat16
    # Features are of size one; bf16 keeps 8 bits and three layers add up.
    assert (in_bf16.float() - expected).abs().max() < 0.1
    in_bf16.float().square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in tower.parameters())
