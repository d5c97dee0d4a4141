"""Recipes: what ships loads, bad input is refused in one sentence, a dump reads back."""

import re

import pytest
import yaml

from aclip.config.recipe import Recipe
from aclip.config.recipe_file import dump_recipe, load_recipe, recipe_names
from aclip.errors import ConfigError

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
]


def refusal(*overrides, recipe="demo"):
    """The one sentence with which the recipe is refused."""
    with pytest.raises(ConfigError) as caught:
        load_recipe(recipe, list(overrides))
    message = str(caught.value)
    assert "\n" not in message
    return message


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


def test_dump_writes_every_default_out():
    values = yaml.safe_load(dump_recipe(load_recipe("demo")))
    assert set(values) == set(Recipe.model_fields)
    assert values["loss"]["simclr_temperature"] == 0.1  # a default that demo.yaml leaves out


def test_overrides_win_over_the_file_and_keep_the_rest_of_a_section():
    recipe = load_recipe(
        "demo",
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
    assert load_recipe("demo", ["train.seed=1", "train.seed=2"]).train.seed == 2


def test_override_can_open_a_section_that_the_file_lacks_and_close_one():
    with_teacher = ["mask.policy=attentive", "teacher.resolution=112"]
    assert load_recipe("clip_vitb16", with_teacher).teacher.resolution == 112
    without = ["teacher=null", "mask.policy=random", "loss.byol=0"]
    assert load_recipe("aclip_vitb16", without).teacher is None


@pytest.mark.parametrize(
    "override, nearest",
    [
        ("mask.keepratio=0.5", "mask.keep_ratio"),
        ("optimiser.lr=1", "optimizer"),
        ("train.globl_batch_size=8", "train.global_batch_size"),
        ("model.image.resolutoin=32", "model.image.resolution"),
        ("teacher.momentun=0.9", "teacher.momentum"),
    ],
)
def test_unknown_key_names_the_nearest(override, nearest):
    message = refusal(override)
    assert override.split("=")[0].split(".")[0] in message
    assert f"did you mean {nearest}?" in message


def test_unknown_key_lists_the_known_ones_of_its_section():
    message = refusal("mask.zzz=1")
    assert "mask.zzz" in message
    for known in ("mask.policy", "mask.keep_ratio", "mask.block_size"):
        assert known in message


@pytest.mark.parametrize(
    "override, hint",
    [
        ("lr=1e-3", "did you mean optimizer.lr?"),
        ("epochs=3", "did you mean train.epochs?"),
        ("data.sources.0.weight=3", "data.sources is .* a list"),
    ],
)
def test_key_without_its_section_and_item_of_a_list_are_refused_with_a_hint(override, hint):
    assert re.search(hint, refusal(override))


def test_pattern_that_the_shell_has_expanded_is_refused_with_a_hint(tmp_path):
    shard = tmp_path / "b.tar"
    shard.touch()
    assert "quotes" in refusal(str(shard))


def test_unknown_key_in_a_file_is_refused_like_one_in_an_override(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("loss: {simcrl: 0}\n")
    assert "did you mean loss.simclr?" in refusal(recipe=str(path))


@pytest.mark.parametrize(
    "override, field, value",
    [
        ("mask.keep_ratio=half", "mask.keep_ratio", "'half'"),
        ("mask=5", "mask", "5"),
        ("train.global_batch_size=2.5", "train.global_batch_size", "2.5"),
        ("train.seed=[1]", "train.seed", "[1]"),
        ("loss.simclr_widths=[1, 2]", "loss.simclr_widths", "[1, 2]"),
        ("views.scale=[low, 1]", "views.scale", "'low'"),
        ("data.val=", "data.val is", "None"),
        ("data.train={a: 1}", "data.train is", "{'a': 1}"),
        ("model.image.name=5", "model.image.name", "5"),
        ("model.image.kwargs=[1]", "model.image.kwargs", "[1]"),
        ("model.image.freeze_patch_embed=perhaps", "model.image.freeze_patch_embed", "'perhaps'"),
        ("mask.policy=clever", "mask.policy", "'clever'"),
    ],
)
def test_value_of_the_wrong_type_is_refused_with_field_and_value(override, field, value):
    message = refusal(override)
    assert message.startswith(field)
    assert value in message


@pytest.mark.parametrize(
    "override",
    [
        "mask.keep_ratio=0",
        "mask.keep_ratio=1.01",
        "mask.keep_ratio=-0.5",
        "mask.keep_ratio=.nan",
        "mask.block_size=0",
        "views.student=3",
        "views.student=0",
        "teacher.momentum=1.5",
        "teacher.resolution=0",
        "loss.contrastive=0",
        "loss.byol=-1",
        "loss.simclr_temperature=0",
        "optimizer.lr=0",
        "optimizer.weight_decay=-0.1",
        "train.global_batch_size=1",
        "train.epochs=0",
        "train.keep_checkpoints=0",
        "data.lanes=0",
        "data.workers=-1",
        "augment.blur_prob=2",
        "model.text.context_length=2",
    ],
)
def test_value_out_of_range_is_refused_with_its_field(override):
    assert refusal(override).startswith(override.split("=")[0] + " is ")


@pytest.mark.parametrize("ratio", ["1", "0.01"])
def test_both_ends_of_the_keep_ratio_are_allowed(ratio):
    assert load_recipe("demo", [f"mask.keep_ratio={ratio}"]).mask.keep_ratio == float(ratio)


@pytest.mark.parametrize(
    "recipe, overrides, named",
    [
        ("demo", ["teacher=null"], ["teacher is empty", "mask.policy attentive needs"]),
        ("clip_vitb16", ["teacher.resolution=224"], ["teacher", "none", "teacher=null"]),
        ("random_2x50_vitb16", ["loss.byol=2"], ["teacher", "random", "loss.byol 2"]),
        ("slip_vitb16", ["ssl_augment.blur_sigma=[2,1]"], ["ssl_augment.blur_sigma is [2, 1]"]),
        ("attentive_1x50_vitb16", ["loss.simclr=1"], ["loss.simclr", "views.student"]),
        ("demo", ["views.scale=[0.9, 0.5]"], ["views.scale", "0.9", "0.5"]),
        ("demo", ["views.scale=[0, 1]"], ["views.scale"]),
        ("demo", ["views.scale=[0.5, 1.1]"], ["views.scale", "1.1"]),
    ],
)
def test_parts_that_contradict_each_other_are_refused(recipe, overrides, named):
    message = refusal(*overrides, recipe=recipe)
    for word in named:
        assert word in message


@pytest.mark.parametrize(
    "policy, byol, needs", [("attentive", 0, True), ("inverse", 0, True), ("random", 2, True)]
)
def test_teacher_is_needed_by_scores_or_by_byol(policy, byol, needs):
    assert load_recipe("demo", [f"mask.policy={policy}", f"loss.byol={byol}"]).needs_teacher


def test_unknown_recipe_names_the_nearest_and_lists_all():
    message = refusal(recipe="aclip_vitb")
    assert "aclip_vitb16" in message
    for name in SHIPPED:
        assert name in message


def test_missing_file_is_refused(tmp_path):
    assert "there is no such file" in refusal(recipe=str(tmp_path / "absent.yaml"))


@pytest.mark.parametrize("text", ["mask: {policy: none", "a: b: c"])
def test_file_that_is_not_yaml_is_refused(tmp_path, text):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    message = refusal(recipe=str(path))
    assert str(path) in message
    assert "not YAML" in message


def test_file_that_holds_a_list_is_refused(tmp_path):
    path = tmp_path / "list.yaml"
    path.write_text("- mask\n- views\n")
    assert str(path) in refusal(recipe=str(path))


@pytest.mark.parametrize("override", ["mask.policy", "=3", ""])
def test_override_that_is_not_key_and_value_is_refused(override):
    assert "key.sub=value" in refusal(override)


def test_override_below_a_value_is_refused():
    message = refusal("mask.policy.deep=1")
    assert "policy" in message


def test_override_that_is_not_yaml_is_refused():
    assert "mask.policy" in refusal("mask.policy=[none")


def test_recipe_cannot_be_changed_after_loading():
    recipe = load_recipe("demo")
    with pytest.raises(ValueError, match="frozen"):
        recipe.mask.policy = "none"


def test_recipe_that_is_no_text_is_refused(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xff\xfe\x00a")
    with pytest.raises(ConfigError, match="text"):
        load_recipe(str(path))


@pytest.mark.parametrize(
    "override",
    [
        "optimizer.lr=.inf",
        "train.epochs=.inf",
        "optimizer.betas=[2, 2]",
        "augment.std=[0, 0, 0]",
        "augment.blur_sigma=[2, -1]",
        "loss.simclr_widths=[0, -1, 2]",
        "augment.jitter=[-1, 0, 0, 9]",
    ],
)
def test_value_out_of_range_is_refused(override):
    with pytest.raises(ConfigError, match=override.split("=")[0]):
        load_recipe("demo", [override])


@pytest.mark.parametrize(
    "override, words",
    [
        ("optimizer.lr=true", ["optimizer.lr", "True", "number"]),
        ("model.text.width='512'", ["model.text.width", "'512'", "integer"]),
        ("train.global_batch_size=48.5", ["train.global_batch_size", "48.5"]),
        ("model.image.freeze_patch_embed=1", ["freeze_patch_embed", "boolean"]),
    ],
)
def test_value_of_another_kind_is_not_converted(override, words):
    message = refusal(override)
    assert all(word in message for word in words), message


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
    message = refusal(sources)  # the demo has data.train
    assert "data.train is demo" in message and "one of the two" in message


def test_a_key_that_has_another_name_today_is_still_read():
    assert load_recipe("demo", ["data.max_slot_side=512"]).data.max_image_side == 512


def test_a_recipe_needs_a_loss_that_brings_images_and_captions_together():
    message = refusal("loss.contrastive=0")
    assert (
        message.startswith("loss.contrastive is 0") and "give loss.contrastive a weight" in message
    )
