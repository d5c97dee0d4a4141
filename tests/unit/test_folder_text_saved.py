"""Runs with a text tower out of a folder: loaded without that folder, exported, continued."""

import argparse
import shutil

import pytest
import torch
from run_starts import at, start
from small_recipe import SMALL_RECIPE
from text_folders import write_text_folder

from aclip.config.recipe_file import load_recipe
from aclip.errors import ConfigError
from aclip.evaluation.class_cache import ClassCache
from aclip.evaluation.load_model import load_model
from aclip.run_folder.layout import TEXT_FOLDER
from aclip.training.run_record import record_run
from aclip.weights.export import export

TINY = ["mask.policy=random", "teacher=null", "model.embed_dim=8"]
CAPTIONS = ["a photo of a red circle", "dog", ""]


def recipe_of(folder, *overrides):
    text = f"model.text={{name: {folder}, context_length: 12}}"
    return load_recipe(SMALL_RECIPE, [*TINY, text, *overrides])


def embeds_of(loaded):
    towers = loaded.towers(torch.device("cpu"))
    return towers.encode_text(towers.tokenizer.encode(CAPTIONS))


@pytest.mark.parametrize("kind", ["bert", "llama"])
@torch.no_grad()
def test_a_run_is_evaluated_and_exported_without_its_folder(kind, write_run, tmp_path):
    folder = write_text_folder(tmp_path / "folder", kind)
    recipe = recipe_of(folder)
    run, student, _ = write_run(recipe, has_teacher=False)
    record_run(run, recipe, {}, None, [], 0)
    assert not (run / TEXT_FOLDER / "model.safetensors").exists()
    expected = embeds_of(load_model(str(run)))
    assert expected.shape == (3, 8)
    shutil.rmtree(folder)
    loaded = load_model(str(run))
    torch.testing.assert_close(embeds_of(loaded), expected, rtol=0, atol=0)
    for name, parameter in loaded.student.text.named_parameters():
        assert torch.equal(parameter, dict(student.text.named_parameters())[name])

    def run_export(out, output_format):
        export(
            argparse.Namespace(checkpoint=str(run), out=str(out), format=output_format, model=None)
        )

    for output_format in ("open_clip", "huggingface"):
        words = f"--format is {output_format}, which holds CLIP's own text tower"
        with pytest.raises(ConfigError, match=words) as caught:
            run_export(tmp_path / output_format, output_format)
        assert "\n" not in str(caught.value)
    run_export(tmp_path / "plain", "safetensors")
    shutil.rmtree(run)
    (tmp_path / "plain").rename(tmp_path / "moved")
    exported = load_model(str(tmp_path / "moved" / "model.safetensors"))
    torch.testing.assert_close(embeds_of(exported), expected, rtol=0, atol=0)


def test_a_run_whose_record_is_lost_says_which_folder_it_needs(write_run, tmp_path):
    folder = write_text_folder(tmp_path / "folder", "bert")
    run, *_ = write_run(recipe_of(folder), has_teacher=False)
    shutil.rmtree(folder)
    with pytest.raises(ConfigError, match="folder, which is no folder here") as caught:
        load_model(str(run))
    assert "\n" not in str(caught.value)


def test_class_embeddings_are_kept_apart_by_tokenizer_and_pooling(write_run, tmp_path):
    folder = write_text_folder(tmp_path / "folder", "bert")
    recipe = recipe_of(folder)
    run, *_ = write_run(recipe, has_teacher=False)
    record_run(run, recipe, {}, None, [], 0)

    def cached():
        return ClassCache(tmp_path, load_model(str(run)).student)._weights

    first = cached()
    assert cached() == first
    path = run / TEXT_FOLDER / "tokenizer.json"
    path.write_text(path.read_text().replace('"dog"', '"cat"'))
    assert cached() != first


def test_a_run_goes_on_with_the_same_folder_alone(tmp_path):
    folder = write_text_folder(tmp_path / "folder", "bert")
    text = [f"model.text={{name: {folder}, context_length: 12}}"]
    assert start(tmp_path / "run", overrides=text, saves=[12]) is None
    assert (tmp_path / "run" / TEXT_FOLDER / "tokenizer.json").is_file()
    assert start(tmp_path / "run", overrides=text) == at(12)
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"dog"', '"cat"'))
    with pytest.raises(ConfigError, match='settings .*model.text.name "files .*allow_changes'):
        start(tmp_path / "run", overrides=text)
    assert start(tmp_path / "run", overrides=text, allow_changes=True) == at(12)
    assert start(tmp_path / "run", overrides=text) == at(12)  # what goes on is recorded
    with pytest.raises(ConfigError, match="model.text.pretrained true -> false"):
        start(tmp_path / "run", overrides=[*text, "model.text.pretrained=false"])
    folder.rename(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="^model.text.name is .*, which is no folder here"):
        start(tmp_path / "run", overrides=text)
