"""Image towers with registers, without a CLS token and with rotary positions equal timm's own.

The plain side is timm's model of the same weights: its forward pass on whole images, and its
blocks, image by image, on the rows and rotary positions that are left by hand.
"""

import pytest
import timm
import torch
from plain_towers import compare
from small_recipe import SMALL_RECIPE
from torch import nn

from aclip.config.recipe_file import load_recipe
from aclip.errors import ConfigError
from aclip.method.losses.distill import PatchDecoder
from aclip.method.masks.policy import Selection
from aclip.models.student import build_student
from aclip.models.vit import ImageTower

SIDE = 4
SMALL = {"embed_dim": 48, "depth": 3, "num_heads": 3}
ROTARY = {"embed_dim": 48, "depth": 3, "num_heads": 3}
TINY = "vit_tiny_patch16_224"
GAP = {"class_token": False, "global_pool": "avg"}
TOWERS = {
    "registers": (TINY, SMALL | {"reg_tokens": 4}),
    "registers without positions": (TINY, SMALL | {"reg_tokens": 2, "no_embed_class": True}),
    "CLS token without position": (TINY, SMALL | {"no_embed_class": True}),
    "mean": (TINY, SMALL | GAP),
    "mean beside registers": (TINY, SMALL | GAP | {"reg_tokens": 4, "no_embed_class": True}),
    "mean beside a CLS token": (TINY, SMALL | {"global_pool": "avg"}),
    "mean of all rows": (TINY, SMALL | GAP | {"reg_tokens": 1, "pool_include_prefix": True}),
    "maximum": (TINY, SMALL | {"global_pool": "max"}),
    "attention pool": (TINY, SMALL | {"class_token": False, "global_pool": "map"}),
    "pool beside registers": (TINY, SMALL | {"reg_tokens": 2, "global_pool": "map"}),
    "SigLIP": ("vit_base_patch16_siglip_224", SMALL),
    "BEiT-3": ("beit3_base_patch16_224", SMALL),
    "rotary": ("vit_small_patch16_rope_224", ROTARY),
    "rotary and learned": ("vit_small_patch16_rope_ape_224", ROTARY),
    "rotary, learned by block": ("vit_small_patch16_rope_mixed_224", ROTARY),
    "rotary, mean beside register": ("vit_medium_patch16_rope_reg1_gap_256", ROTARY),
    "EVA-02": ("eva02_tiny_patch14_224", ROTARY | {"patch_size": 16}),
    "EVA-02-CLIP": ("eva02_base_patch16_clip_224", ROTARY),
    "DINOv3": ("vit_small_patch16_dinov3_qkvb", ROTARY),
    "DINOv3, CLS token": ("vit_small_patch16_dinov3", ROTARY | {"global_pool": "token"}),
    "PE, attention pool": ("vit_pe_core_tiny_patch16_384", ROTARY | {"attn_pool_num_heads": 4}),
}
ALL = pytest.mark.parametrize("kind", TOWERS)


def build(kind, resolution=16 * SIDE):
    """The tower, and timm's model with its weights."""
    name, kwargs = TOWERS[kind]
    torch.manual_seed(0)
    tower = ImageTower(name, resolution, kwargs, freeze_patch_embed=False).eval()
    for parameter in tower.parameters():
        # timm starts biases and registers at or near zero, which would hide them.
        nn.init.normal_(parameter, std=0.5) if parameter.ndim < 2 else parameter.data.mul_(3)
    plain = timm.create_model(name, num_classes=0, img_size=resolution, **kwargs).eval()
    plain.load_state_dict(tower.vit.state_dict())
    return tower, plain


def plain_rows(plain, pixels, keep_ids=None):
    """timm's blocks on each image alone, with the patches of keep_ids; the rows, normalised as far
    as timm does it before pooling."""
    embedded = plain._pos_embed(plain.patch_embed(pixels))
    x, rope = embedded if isinstance(embedded, tuple) else (embedded, None)
    prefix = plain.num_prefix_tokens
    images = []
    for number, row in enumerate(x):
        kept = list(range(SIDE * SIDE)) if keep_ids is None else keep_ids[number].tolist()
        row = row[[*range(prefix), *(prefix + i for i in kept)]].unsqueeze(0)
        row = plain.norm_pre(row)
        for index, block in enumerate(plain.blocks):
            if rope is None:
                row = block(row)
                continue
            own = rope[index] if rope.ndim == 4 else rope  # (H, P, 2 d) or (P, 2 d)
            row = block(row, rope=own[..., kept, :])
        images.append(plain.norm(row))
    return torch.cat(images)


def selection_of(num_kept):
    """(selection, ids): two samples with two views, single patches."""
    scores = torch.rand(2, 2, SIDE, SIDE)
    order = scores.flatten(0, 1).flatten(1).argsort(1, descending=True)
    return Selection(scores, None, None, num_kept, 1), order[:, :num_kept].sort(1).values


@ALL
def test_all_patches_equal_timm_forward(kind):
    tower, plain = build(kind)
    pixels = torch.randn(2, 3, 16 * SIDE, 16 * SIDE)
    compare(tower(pixels), plain(pixels), tower.vit, plain)


@ALL
def test_kept_patches_equal_timm_blocks_on_what_is_left(kind):
    tower, plain = build(kind)
    pixels = torch.randn(4, 3, 16 * SIDE, 16 * SIDE)
    selection, keep_ids = selection_of(5)
    expected = plain.forward_head(plain_rows(plain, pixels, keep_ids))
    compare(tower(pixels, selection), expected, tower.vit, plain)


@ALL
def test_rows_of_all_patches_and_of_kept_ones_are_normalised_timm_rows(kind):
    tower, plain = build(kind)
    pixels = torch.randn(4, 3, 16 * SIDE, 16 * SIDE)
    selection, expected_ids = selection_of(7)
    with torch.no_grad():
        rows, keep_ids = tower.forward_patches(pixels, selection)
        assert torch.equal(keep_ids, expected_ids)
        expected = plain.fc_norm(plain_rows(plain, pixels, expected_ids))
        torch.testing.assert_close(rows, expected, rtol=1e-5, atol=1e-5)
        rows, keep_ids = tower.forward_patches(pixels)
        assert keep_ids is None
        expected = plain.fc_norm(plain.forward_features(pixels))
        torch.testing.assert_close(rows, expected, rtol=1e-5, atol=1e-5)
    assert rows.shape[1] == tower.num_prefix + SIDE * SIDE
    decoder = PatchDecoder(tower.width, SIDE * SIDE, 1, nn.Linear(tower.width, 2))
    masked_ids = torch.arange(3).expand(4, 3)
    assert decoder(rows, torch.arange(SIDE * SIDE).expand(4, -1), masked_ids).shape == (4, 3, 2)


def attention_rows(run):
    """What timm's own forward pass attends to in `run`: for each call of fused attention the
    softmax of its first query row, mean over heads."""
    seen, original = [], torch.nn.functional.scaled_dot_product_attention

    def spy(q, k, v, *args, **kwargs):
        logits = q[:, :, :1].double() @ k.double().transpose(-2, -1) * q.shape[-1] ** -0.5
        seen.append(logits.softmax(-1)[:, :, 0].mean(1).float())
        return original(q, k, v, *args, **kwargs)

    torch.nn.functional.scaled_dot_product_attention = spy
    try:
        run()
    finally:
        torch.nn.functional.scaled_dot_product_attention = original
    return seen


@ALL
def test_scores_are_the_attention_of_the_query_that_the_feature_is_read_by(kind):
    tower, plain = build(kind)
    pixels = torch.randn(2, 3, 16 * SIDE, 16 * SIDE)
    with torch.no_grad():
        seen = attention_rows(lambda: plain(pixels))
        features, scores = tower.forward_with_scores(pixels)
        torch.testing.assert_close(features, plain(pixels), rtol=1e-5, atol=1e-5)
        if plain.global_pool not in ("token", "map"):
            assert scores is None and not tower.has_scores
            assert tower.forward_with_scores(pixels, with_features=False) == (None, None)
            return
        layers = seen[-1:] if plain.global_pool == "map" else seen
        expected = torch.stack([row[:, -SIDE * SIDE :] for row in layers]).mean(0)
        torch.testing.assert_close(scores.flatten(1), expected, rtol=1e-5, atol=1e-6)
        none, alone = tower.forward_with_scores(pixels, with_features=False)
        assert none is None
        torch.testing.assert_close(alone, scores, rtol=1e-5, atol=1e-6)
        if plain.global_pool == "token":
            _, first = tower.forward_with_scores(pixels, 2)
            expected = torch.stack([row[:, -SIDE * SIDE :] for row in seen[:2]]).mean(0)
            torch.testing.assert_close(first.flatten(1), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "kind", ["registers", "rotary", "rotary, learned by block", "DINOv3", "pool beside registers"]
)
def test_a_smaller_view_is_as_in_timm_at_its_size(kind):
    tower, _ = build(kind)
    name, kwargs = TOWERS[kind]
    plain = timm.create_model(name, num_classes=0, img_size=16 * SIDE, **kwargs).eval()
    plain.load_state_dict(tower.vit.state_dict())
    plain.set_input_size(img_size=32)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(tower(pixels), plain(pixels), rtol=1e-5, atol=1e-5)
        assert tower(torch.randn(1, 3, 64, 64)).isfinite().all()


@pytest.mark.parametrize("recompute", ["elementwise", "blocks"])
@pytest.mark.parametrize("kind", ["attention pool", "EVA-02", "rotary, learned by block"])
def test_recomputed_towers_have_the_same_gradients(kind, recompute):
    tower, _ = build(kind)
    pixels = torch.randn(4, 3, 16 * SIDE, 16 * SIDE)
    selection, _ = selection_of(5)
    expected = {}
    for mode in ("none", recompute):
        tower.recompute = mode
        tower.zero_grad()
        tower(pixels, selection).sin().sum().backward()
        for name, parameter in tower.named_parameters():
            if mode == "none":
                expected[name] = parameter.grad.clone()
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5)


def test_rotary_positions_stay_in_fp32_in_a_bf16_tower():
    tower, _ = build("rotary")
    expected = tower._rotary.of_grid(SIDE, torch.device("cpu")).clone()
    tower.bfloat16()
    tower._rotary._known.clear()
    with torch.inference_mode():
        angles = tower._rotary.of_grid(SIDE, torch.device("cpu"))
    assert angles.dtype == torch.float32 and torch.equal(angles, expected)
    # What an evaluation has asked for can be trained with.
    out = tower(torch.randn(2, 3, 64, 64).bfloat16())
    out.float().square().sum().backward()
    assert out.dtype == torch.bfloat16


IMAGE = (
    "model.image={name: vit_tiny_patch16_224, resolution: 64, kwargs: {patch_size: 8, depth: 2, "
)


@pytest.mark.parametrize(
    "overrides, sentence",
    [
        (
            [IMAGE + "class_token: false, global_pool: avg}}"],
            "mask.policy is attentive, but the image tower pools by avg, so that no query",
        ),
        (
            [IMAGE + "class_token: false, global_pool: map}}", "teacher.score_layers=1"],
            "teacher.score_layers is 1, but the image tower's scores are the attention of the pool",
        ),
    ],
)
def test_scores_that_a_tower_has_not_are_refused(overrides, sentence):
    with pytest.raises(ConfigError, match=sentence) as caught, torch.device("meta"):
        build_student(load_recipe(SMALL_RECIPE, overrides))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name, kwargs, words",
    [
        ("beit_base_patch16_224", {}, "is a Beit, whose layers may need the whole grid"),
        ("vit_relpos_base_patch16_224", {}, "is a VisionTransformerRelPos"),
        ("vit_base_r50_s16_224", {}, "embeds patches by a HybridEmbed"),
        (TINY, {"pos_embed": "none"}, "has no positions"),
        (TINY, {"global_pool": ""}, "pools by nothing"),
        (TINY, {"global_pool": "prr"}, "pools by prr"),
        ("vit_base_patch16_rpn_224", {}, "has blocks of another kind"),
        ("vit_small_patch16_rope_224", {"use_post_norm": True}, "has blocks of another kind"),
        ("vit_small_patch16_rope_224", {"gated_attn": True}, "gated"),
        ("vit_small_patch16_rope_224", {"rope_shift_coords": 0.5}, "rotary positions at random"),
        (
            "vit_small_patch16_rope_224",
            {"num_kv_heads": 2, "qkv_fused": False, "attn_type": "rope"},
            "shares keys",
        ),
        ("vit_small_patch16_rope_224", {"patch_drop_rate": 0.5}, "drops patches"),
    ],
)
def test_a_tower_that_can_not_drop_patches_is_refused_in_one_sentence(name, kwargs, words):
    with pytest.raises(ConfigError, match=words) as caught, torch.device("meta"):
        ImageTower(name, 64, kwargs)
    assert "\n" not in str(caught.value)
