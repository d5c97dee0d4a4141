"""Folders that can not be a text tower, and keys that go with none, are refused in one sentence."""

import json

import pytest
from small_recipe import SMALL_RECIPE
from text_folders import write_text_folder

from aclip.config.recipe_file import load_recipe
from aclip.config.sections import TextTowerConfig
from aclip.config.text_folder import read_text_folder
from aclip.data.tokenizer import build_tokenizer
from aclip.errors import ConfigError
from aclip.models.text import build_text_tower

CONTEXT = 10


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    return {kind: write_text_folder(root / kind, kind) for kind in ("bert", "gpt2")}


def config_of(folder, **keys):
    return TextTowerConfig(name=str(folder), context_length=CONTEXT, **keys)


def damaged(folder, tmp_path, kind):
    if kind == "missing":
        return tmp_path / "nowhere"
    copy = tmp_path / kind
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    config = json.loads((copy / "config.json").read_text())
    if kind == "no config":
        (copy / "config.json").unlink()
    elif kind == "config without type":
        del config["model_type"]
    elif kind == "no tokenizer":
        (copy / "tokenizer.json").unlink()
    elif kind == "no weights":
        (copy / "model.safetensors").unlink()
    elif kind == "other type":
        config["model_type"] = "t5"
    elif kind == "decoder":
        config["is_decoder"] = True
    elif kind == "short":
        config["max_position_embeddings"] = CONTEXT - 1
    elif kind == "window":
        config["sliding_window"] = CONTEXT - 1
    elif kind == "larger":
        config["num_hidden_layers"] = 3
    elif kind == "small vocabulary":
        config["vocab_size"] = 7
    elif kind == "broken tokenizer":
        (copy / "tokenizer.json").write_text("{")
    elif kind == "broken weights":
        (copy / "model.safetensors").write_bytes(b"nothing")
    if (copy / "config.json").exists():
        (copy / "config.json").write_text(json.dumps(config))
    return copy


@pytest.mark.parametrize(
    "kind, words",
    [
        ("missing", "nowhere, which is no folder here; give a local folder"),
        ("no config", "config.json is missing or does not say model_type"),
        ("config without type", "does not say model_type"),
        ("no tokenizer", "holds no tokenizer"),
        ("no weights", "holds no weights .*pretrained=false"),
        ("other type", "a model of the type t5, which is not among those"),
        ("decoder", "a model of the type bert, which is not among"),
        ("short", "context_length is 10, but the model in .* reads 9 tokens at most"),
        ("window", "context_length is 10, but the model in .* reads 9 tokens at most"),
    ],
)
def test_a_folder_that_does_not_do_is_refused_before_anything_is_loaded(
    folders, tmp_path, kind, words
):
    with pytest.raises(ConfigError, match=words) as caught:
        read_text_folder(config_of(damaged(folders["bert"], tmp_path, kind)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "kind, build, words",
    [
        ("larger", build_text_tower, "whose weights lack encoder.layer.2"),
        ("broken weights", build_text_tower, "transformers can't load"),
        ("small vocabulary", build_tokenizer, "has 24 ids, but its model 7"),
        ("broken tokenizer", build_tokenizer, "tokenizer transformers can't load"),
    ],
)
def test_a_damaged_folder_is_refused_in_one_sentence(folders, tmp_path, kind, build, words):
    with pytest.raises(ConfigError, match=words) as caught:
        build(config_of(damaged(folders["bert"], tmp_path, kind)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "kind, pooling, words",
    [
        ("gpt2", "cls", "pooling is cls, but .* is a gpt2, whose first token reads nothing"),
        ("bert", "end", "pooling is end, but .* is a bert, whose tokens read the whole"),
    ],
)
def test_a_pooling_that_reads_nothing_is_refused(folders, kind, pooling, words):
    with pytest.raises(ConfigError, match=words):
        build_text_tower(config_of(folders[kind], pooling=pooling))


@pytest.mark.parametrize(
    "override, words",
    [
        ("model.text={name: /x, width: 256}", "model.text.width is 256, but the model in"),
        ("model.text={name: /x, recompute: elementwise}", "recompute is elementwise, which"),
        ("model.text={pooling: mean}", "model.text.pooling is mean, but model.text.name is empty"),
        ("model.text={pretrained: false}", "pretrained is false, but model.text.name is empty"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(override, words):
    with pytest.raises(ConfigError, match=words):
        load_recipe(SMALL_RECIPE, [override])


def test_losses_and_compilation_of_clips_own_tower_are_refused():
    text = "model.text={name: /x}"
    with pytest.raises(ConfigError, match="loss.mlm is 1, .* but model.text.name is /x"):
        load_recipe(SMALL_RECIPE, [text, "loss.mlm=1"])
    with pytest.raises(ConfigError, match="text.reduce is block, .* but model.text.name is /x"):
        load_recipe(SMALL_RECIPE, [text, "text.reduce=block"])
    with pytest.raises(ConfigError, match="model.compile is true, but model.text.name is /x"):
        load_recipe(SMALL_RECIPE, [text, "model.compile=true"])
