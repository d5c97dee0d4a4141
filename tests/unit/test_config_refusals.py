"""Recipes: bad input is refused in one sentence."""

import re
import shlex

import pytest
import yaml
from recipe_refusal import refusal
from small_recipe import SMALL_RECIPE

from aclip.config.recipe_file import _apply_override, load_recipe
from aclip.errors import ConfigError


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
        ("mask.warmup=long", "mask.warmup", "'long'"),
        ("mask.warmup_change=slowly", "mask.warmup_change", "'slowly'"),
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
        "mask.warmup=1",
        "mask.warmup=-0.1",
        "mask.warmup=.nan",
        "mask.temperature=-1",
        "mask.temperature=101",
        "views.student=3",
        "views.student=0",
        "teacher.momentum=1.5",
        "teacher.resolution=0",
        "teacher.score_layers=0",
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
        "model.text.heads=7",
    ],
)
def test_value_out_of_range_is_refused_with_its_field(override):
    assert refusal(override).startswith(override.split("=")[0] + " is ")


@pytest.mark.parametrize(
    "recipe, overrides, named",
    [
        (SMALL_RECIPE, ["teacher=null"], ["teacher is empty", "mask.policy attentive needs"]),
        ("clip_vitb16", ["teacher.resolution=224"], ["teacher", "none", "teacher=null"]),
        ("random_2x50_vitb16", ["loss.byol=2"], ["teacher", "random", "loss.byol 2"]),
        ("slip_vitb16", ["ssl_augment.blur_sigma=[2,1]"], ["ssl_augment.blur_sigma is [2, 1]"]),
        ("attentive_1x50_vitb16", ["loss.simclr=1"], ["loss.simclr", "views.student"]),
        (
            "maskclip_vitb16",
            ["teacher.score_layers=4"],
            ["teacher.score_layers is 4", "mask.policy none", "remove the key"],
        ),
        (SMALL_RECIPE, ["views.scale=[0.9, 0.5]"], ["views.scale", "0.9", "0.5"]),
        ("random_2x50_vitb16", ["mask.warmup=0.2"], ["mask.warmup is 0.2", "random", "=0"]),
        ("gaussian_1x50_vitb16", ["mask.temperature=2"], ["mask.temperature is 2", "gaussian"]),
        ("clip_vitb16", ["mask.warmup=0.2"], ["mask.warmup is 0.2", "mask.policy none"]),
        (SMALL_RECIPE, ["views.scale=[0, 1]"], ["views.scale"]),
        (SMALL_RECIPE, ["views.scale=[0.5, 1.1]"], ["views.scale", "1.1"]),
    ],
)
def test_parts_that_contradict_each_other_are_refused(recipe, overrides, named):
    message = refusal(*overrides, recipe=recipe)
    for word in named:
        assert word in message


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
        load_recipe(SMALL_RECIPE, [override])


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


def test_a_recipe_needs_a_loss_that_brings_images_and_captions_together():
    message = refusal("loss.contrastive=0")
    assert (
        message.startswith("loss.contrastive is 0") and "give loss.contrastive a weight" in message
    )


@pytest.mark.parametrize(
    "override, way_out",
    [
        ("data.train=[/d/{0..3}.tar]", """data.train='["/d/{0..3}.tar"]'"""),
        (
            "data.train=[/d/{a,b}/{0..3}.tar, '/e/x y.tar']",
            """data.train='["/d/{a,b}/{0..3}.tar", "/e/x y.tar"]'""",
        ),
        ("data.train={0..3}.tar", """data.train='"{0..3}.tar"'"""),
        ("data.train=*.tar", """data.train='"*.tar"'"""),
        ("data.train=%20.tar", """data.train='"%20.tar"'"""),
        ("data.train=/d/a #1/x.tar", """data.train='"/d/a #1/x.tar"'"""),
        ("data.train=/d/a: b/x.tar", """data.train='"/d/a: b/x.tar"'"""),
        ("train.wandb=- a", """train.wandb='"- a"'"""),
    ],
)
def test_value_that_yaml_reads_otherwise_is_refused_with_the_way_to_write_it(override, way_out):
    assert refusal(override).endswith(f"; put quotes around it, {way_out}")
    (word,) = shlex.split(way_out)
    values, key, written = {}, *override.split("=")
    _apply_override(values, word)
    section, name = key.split(".")
    given = values[section][name]
    if isinstance(given, list):
        assert all(item in written for item in given)
    else:
        assert given == written


def test_pattern_with_braces_in_a_source_is_refused_with_an_example():
    message = refusal("data.sources=[{shards: /d/{0..3}.tar, weight: 2}]")
    assert message.startswith("data.sources is [{shards: /d/{0..3}.tar, weight: 2}], which is not")
    example = message.split("as data.sources=")[1]
    assert yaml.safe_load(*shlex.split(example)) == [{"shards": "/data/{00..99}.tar", "weight": 1}]


@pytest.mark.parametrize(
    "text, value",
    [
        ("/a b/x.tar", "/a b/x.tar"),
        ("[a.tar,b.tar]", ["a.tar", "b.tar"]),
        ("[/a b/x.tar, '/d/{0..1}.tar']", ["/a b/x.tar", "/d/{0..1}.tar"]),
        ("/d/{a,b}/{0..9}.tar", "/d/{a,b}/{0..9}.tar"),
        ("/d/a#1.tar", "/d/a#1.tar"),
        ("'/d/a #1: x.tar'", "/d/a #1: x.tar"),
        ("s3://b/{0..1}.tar", "s3://b/{0..1}.tar"),
        ("pipe:cat {0..1}.tar", "pipe:cat {0..1}.tar"),
    ],
)
def test_paths_are_taken_as_they_stand(text, value):
    assert load_recipe(SMALL_RECIPE, [f"data.train={text}"]).data.train == value


def test_power_of_ten_is_a_number_of_epochs():
    assert load_recipe(SMALL_RECIPE, ["train.epochs=1e3"]).train.epochs == 1000
