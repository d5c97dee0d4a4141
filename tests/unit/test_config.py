"""Recipes: what ships loads, overrides win over the file, a dump reads back."""

import pytest
import yaml
from recipe_refusal import refusal
from small_recipe import SMALL_RECIPE

from aclip.config.recipe import Recipe
from aclip.config.recipe_file import dump_recipe, load_recipe, recipe_names

SHIPPED = [
    "aclip_eff_vitb16",
    "aclip_vitb16",
    "aclip_vitl16",
    "attentive_1x50_vitb16",
    "attentive_2x50_vitb16",
    "clip_vitb16",
    "demo",
    "inverse_2x50_vitb16",
    "random_1x50_vitb16",
    "random_2x50_vitb16",
    *(f"{method}_vit{size}16" for method in ("clip", "slip", "aclip") for size in "sbl"),
    "maskclip_vitb16",
    "aclip_fast_vitb16",
    "attentive_1x50_fast_vitb16",
]


def test_recipes_of_the_paper_and_the_demo_ship():
    assert set(SHIPPED) <= set(recipe_names())
    assert recipe_names() == sorted(recipe_names())


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipe_loads_and_survives_a_dump(name, tmp_path):
    recipe = load_recipe(name)
    path = tmp_path / "dumped.yaml"
    path.write_text(dump_recipe(recipe))
    assert load_recipe(str(path)) == recipe


@pytest.mark.parametrize(
    "name, policy, views, teacher, simclr, byol",
    [
        ("aclip_vitb16", "attentive", 2, 224, 1, 2),
        ("aclip_eff_vitb16", "attentive", 2, 112, 1, 2),
        ("aclip_vitl16", "attentive", 2, 224, 1, 2),
        ("clip_vitb16", "none", 1, None, 0, 0),
        ("random_1x50_vitb16", "random", 1, None, 0, 0),
        ("random_2x50_vitb16", "random", 2, None, 0, 0),
        ("attentive_1x50_vitb16", "attentive", 1, 224, 0, 0),
        ("attentive_2x50_vitb16", "attentive", 2, 224, 0, 0),
        ("inverse_2x50_vitb16", "inverse", 2, 224, 0, 0),
    ],
)
def test_paper_recipe_has_the_published_settings(name, policy, views, teacher, simclr, byol):
    recipe = load_recipe(name)
    assert recipe.mask.policy == policy
    assert recipe.views.student == views
    assert (recipe.teacher.resolution if recipe.teacher else None) == teacher
    assert (recipe.loss.contrastive, recipe.loss.simclr, recipe.loss.byol) == (1, simclr, byol)
    assert recipe.loss.max_logit_scale == 100
    optimizer = recipe.optimizer
    assert (optimizer.lr, optimizer.weight_decay, optimizer.eps) == (5e-4, 0.5, 1e-8)
    assert (optimizer.warmup_start_lr, optimizer.final_lr) == (1e-6, 1e-5)
    assert optimizer.betas == (0.9, 0.98)
    train = recipe.train
    assert (train.global_batch_size, train.epochs, train.warmup_epochs) == (4096, 25, 1)


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_of_the_paper_s_code_freeze_the_patch_embedding_and_others_train_it(name):
    masks = ("attentive_", "random_", "inverse_", "gaussian_")
    freezes = name.startswith(("aclip_", "maskclip_", "lit_", *masks))
    assert load_recipe(name).model.image.freeze_patch_embed == freezes


def test_dump_writes_every_default_out():
    values = yaml.safe_load(dump_recipe(load_recipe(SMALL_RECIPE)))
    assert set(values) == set(Recipe.model_fields)
    assert values["loss"]["simclr_temperature"] == 0.1  # a default that the file leaves out


def test_overrides_win_over_the_file_and_keep_the_rest_of_a_section():
    recipe = load_recipe(
        SMALL_RECIPE,
        [
            "optimizer.lr=1e-3",
            "views.scale=[0.3, 1]",
            "mask.policy=inverse",
            "model.image.kwargs.depth=7",
            "data.train=[/a.tar, /b.tar]",
            "data.val=/{00..10}.tar",
            "data.lanes=null",
        ],
    )
    assert recipe.optimizer.lr == 0.001
    assert recipe.views.scale == (0.3, 1.0)
    assert recipe.mask.policy == "inverse"
    assert recipe.mask.keep_ratio == 0.5
    assert recipe.model.image.kwargs == {
        "patch_size": 8,
        "embed_dim": 96,
        "depth": 7,
        "num_heads": 3,
    }
    assert recipe.data.train == ["/a.tar", "/b.tar"]
    assert recipe.data.val == "/{00..10}.tar"
    assert recipe.data.lanes is None


def test_the_last_of_two_overrides_of_a_key_wins():
    assert load_recipe(SMALL_RECIPE, ["train.seed=1", "train.seed=2"]).train.seed == 2


def test_override_can_open_a_section_that_the_file_lacks_and_close_one():
    with_teacher = ["mask.policy=attentive", "teacher.resolution=112"]
    assert load_recipe("clip_vitb16", with_teacher).teacher.resolution == 112
    without = ["teacher=null", "mask.policy=random", "loss.byol=0"]
    assert load_recipe("aclip_vitb16", without).teacher is None


@pytest.mark.parametrize("ratio", ["1", "0.01"])
def test_both_ends_of_the_keep_ratio_are_allowed(ratio):
    assert load_recipe(SMALL_RECIPE, [f"mask.keep_ratio={ratio}"]).mask.keep_ratio == float(ratio)


@pytest.mark.parametrize(
    "policy, byol, needs", [("attentive", 0, True), ("inverse", 0, True), ("random", 2, True)]
)
def test_teacher_is_needed_by_scores_or_by_byol(policy, byol, needs):
    assert load_recipe(SMALL_RECIPE, [f"mask.policy={policy}", f"loss.byol={byol}"]).needs_teacher


def test_unknown_recipe_names_the_nearest_and_lists_all():
    message = refusal(recipe="aclip_vitb")
    assert "aclip_vitb16" in message
    for name in SHIPPED:
        assert name in message


def test_recipe_cannot_be_changed_after_loading():
    recipe = load_recipe(SMALL_RECIPE)
    with pytest.raises(ValueError, match="frozen"):
        recipe.mask.policy = "none"


def test_scientific_notation_is_a_number(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("optimizer: {lr: 1e-3}\ntrain: {checkpoint_every: 1e6}\n")
    recipe = load_recipe(str(path), ["mask.policy=none", "loss.byol=0", "data.min_image_side=2e1"])
    assert recipe.optimizer.lr == 0.001
    assert recipe.train.checkpoint_every == 1_000_000
    assert recipe.data.min_image_side == 20


def test_sources_are_checked_like_every_other_section():
    sources = "data.sources=[{shards: /a.tar, weight: 3}, {shards: [/b.tar, /c.tar], weight: 0.5}]"
    first, second = load_recipe("clip_vitb16", [sources]).data.sources
    assert (first.shards, first.weight) == ("/a.tar", 3)
    assert (second.shards, second.weight) == (["/b.tar", "/c.tar"], 0.5)
    message = refusal("data.sources=[{shards: /a.tar, wieght: 3}]", recipe="clip_vitb16")
    assert "data.sources.0.wieght" in message and "data.sources.0.weight?" in message
    message = refusal("data.sources=[{shards: /a.tar, weight: 0}]", recipe="clip_vitb16")
    assert "data.sources.0.weight is 0" in message
    message = refusal(sources)  # which has data.train
    assert "data.train is demo" in message and "one of the two" in message


def test_a_key_that_has_another_name_today_is_still_read():
    assert load_recipe(SMALL_RECIPE, ["data.max_slot_side=512"]).data.max_image_side == 512
