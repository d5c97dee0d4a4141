"""Weights as other tools leave them: each is recognised, or named by what was found."""

import argparse
import pickle
import time

import huggingface_hub.constants
import pytest
import timm
import torch
from released_model import DEMO, released_model
from safetensors.torch import save_file
from small_recipe import SMALL_RECIPE

from aclip.config.recipe_file import load_recipe
from aclip.errors import ConfigError
from aclip.evaluation.load_model import load_model
from aclip.models.student import build_student
from aclip.weights.export import export
from aclip.weights.find_named import check_init
from aclip.weights.initial_weights import load_initial_weights
from aclip.weights.names import tower_facts


@pytest.mark.parametrize("output_format", ["open_clip", "huggingface", "safetensors"])
def test_own_exports_are_read_as_folder_and_as_file(output_format, write_run, tmp_path):
    recipe = load_recipe(SMALL_RECIPE, ["loss.byol=2"])
    run, student, _ = write_run(recipe)
    out = tmp_path / "out"
    export(
        argparse.Namespace(checkpoint=str(run), out=str(out), format=output_format, model="student")
    )
    (file,) = out.glob("*.safetensors")
    expected = student.model_parameters()
    for path in (f"{out}", f"{out}/", f"local-dir:{out}", str(file)):
        if not path.startswith("local-dir:"):
            check_init(path)
        other = build_student(load_recipe(SMALL_RECIPE, ["loss.byol=2", "train.seed=5"]))
        load_initial_weights(other, path)
        loaded = load_model(path)
        assert loaded.recipe.model.image.resolution == recipe.model.image.resolution
        assert tower_facts(loaded.student) == tower_facts(student)
        assert loaded.recipe.augment.mean == pytest.approx(recipe.augment.mean)
        for model in (other, loaded.student):
            found = model.model_parameters()
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_checkpoints_own_files_are_read_where_they_are_and_copied_elsewhere(write_run, tmp_path):
    run, student, teacher = write_run(load_recipe(SMALL_RECIPE, ["loss.byol=2"]))
    (folder,) = (run / "checkpoints").glob("samples-*")
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes((folder / "student.safetensors").read_bytes())
    name = "image.vit.cls_token"
    for path, expected in (
        (run, teacher),
        (folder, teacher),
        (run / "checkpoints", teacher),
        (folder / "student.safetensors", student),
        (folder / "teacher.safetensors", teacher),
        (copy, student),
    ):
        ours = build_student(load_recipe(SMALL_RECIPE))
        report = load_initial_weights(ours, str(path))
        assert torch.equal(ours.model_parameters()[name], expected.model_parameters()[name])
    assert report.ignored and all(key.startswith("byol") for key in report.ignored)
    assert load_model(str(folder / "student.safetensors")).description.startswith("student of")
    with pytest.raises(ConfigError, match="--model is teacher, but .* holds the student"):
        load_model(str(folder / "student.safetensors"), "teacher")


class Settings:
    """What a training script pickles beside the weights."""


def test_what_is_no_weights_is_named_by_what_was_found(tmp_path):
    safetensors = tmp_path / "cut.safetensors"
    save_file({"x": torch.zeros(100)}, safetensors)
    whole = safetensors.stat().st_size
    lfs = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 600000000\n"
    files = {
        "empty.pt": b"",
        "lfs.pt": lfs.encode(),
        "lfs.safetensors": lfs.encode(),
        "page.pt": b"\n<!DOCTYPE html><html><head><title>Sign in</title>",
        "packed.pt": b"\x1f\x8b\x08\x00" + bytes(50),
        "cut.safetensors": safetensors.read_bytes()[:-40],
        "text.pt": b"weights come later",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    torch.save(released_model(DEMO).state_dict(), tmp_path / "cut.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "cut.pt").read_bytes()[:-5000])
    (tmp_path / "objects.ckpt").write_bytes(
        pickle.dumps({"state_dict": {}, "hyper_parameters": Settings()}, protocol=2)
    )
    torch.save({"epoch": 3, "optimizer": {}}, tmp_path / "optimizer.pt")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    twice = {"a.weight": torch.zeros(1), "module.a.weight": torch.zeros(1)}
    torch.save(twice, tmp_path / "twice.pt")
    torch.save(released_model(DEMO).visual.state_dict(), tmp_path / "vit.pt")
    torch.save({f"layer{i}.weight": torch.zeros(1) for i in range(5)}, tmp_path / "resnet.pt")
    folders = {
        "deepspeed": ("global_step8/mp_rank_00_model_states.pt", "latest"),
        "one": ("model.pt", "log.txt"),
        "several": ("checkpoints/epoch_1.pt", "checkpoints/epoch_2.pt"),
        "pictures": tuple(f"{i}.jpg" for i in range(7)),
        "nothing": (),
        "clip": ("config.json", "model.safetensors"),
        "no weights": ("open_clip_config.json",),
        "young run": ("metrics.jsonl",),
    }
    for folder, names in folders.items():
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / name).parent.mkdir(exist_ok=True)
            (tmp_path / folder / name).write_bytes(b"x")
    (tmp_path / "clip/config.json").write_text('{"model_type": "clip"}')
    (tmp_path / "deepspeed/latest").write_text("global_step8")
    early = {
        "empty.pt": "the file is empty",
        "lfs.pt": r"a Git LFS pointer; run `git lfs pull`",
        "lfs.safetensors": "a Git LFS pointer",
        "page.pt": "a web page",
        "packed.pt": "compressed; unpack it",
        "cut.pt": "the end of its archive is missing",
        "cut.safetensors": f"it ends after {whole - 40} of {whole} bytes",
        "deepspeed": f"DeepSpeed's own.*zero_to_fp32.py, which lies in {tmp_path}/deepspeed,",
        "deepspeed/global_step8": f"DeepSpeed's own.*lies in {tmp_path}/deepspeed,",
        "deepspeed/global_step8/mp_rank_00_model_states.pt": f"lies in {tmp_path}/deepspeed,",
        "one": r"holds model\.pt; give that file",
        "several": r"holds checkpoints/epoch_1\.pt, checkpoints/epoch_2\.pt; give one of",
        "pictures": r"holds 0\.jpg, 1\.jpg, 2\.jpg, 3\.jpg, 4\.jpg and 2 more",
        "nothing": "but is empty",
        "clip": "a Hugging Face folder of a clip model",
        "no weights": "holds open_clip_config.json, but no open_clip_model",
        "young run": "a run that has no checkpoint yet",
        "absent": "does not exist",
    }
    later = {
        "text.pt": r"no checkpoint that torch can read \(it begins with 'weights come later'\)",
        "objects.ckpt": r"other than weights \([\w.]+\.Settings\).*weights_only=False",
        "optimizer.pt": "no weights by name, but the keys epoch, optimizer; give",
        "tensor.pt": "no weights by name, but Tensor; give",
        "twice.pt": r"a\.weight twice",
        "vit.pt": "a timm image tower; write timm:",
        "resnet.pt": r"no known layout \(layer0.weight, layer1.weight, layer2.weight and 2 more\)",
    }
    student = build_student(load_recipe(SMALL_RECIPE))
    for name, words in (early | later).items():
        path = str(tmp_path / name)
        if name in early:
            with pytest.raises(ConfigError, match=words):
                check_init(path)
        else:
            check_init(path)
        for load in (lambda path: load_initial_weights(student, path), load_model):
            with pytest.raises(ConfigError, match=words) as refusal:
                load(path)
            assert path in str(refusal.value) and "\n" not in str(refusal.value)
    with pytest.raises(ConfigError, match="a Git LFS pointer"):
        check_init(f"timm:{tmp_path}/lfs.pt")
    check_init("timm:vit_tiny_patch16_224")
    check_init("")


@pytest.fixture
def no_hub(tmp_path, monkeypatch):
    """No network: nothing listens where the hub is said to be. Returns the cache's folder."""
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return tmp_path / "hub"


def test_pretrained_model_without_a_network_is_refused_in_seconds(no_hub):
    begin = time.monotonic()
    with pytest.raises(ConfigError, match=r"--init is timm:vit_tiny.*127\.0\.0\.1:9 can't be"):
        load_initial_weights(build_student(load_recipe(SMALL_RECIPE)), "timm:vit_tiny_patch16_224")
    assert time.monotonic() - begin < 10
    assert not huggingface_hub.constants.HF_HUB_OFFLINE


def test_cached_pretrained_model_is_loaded_without_a_network(no_hub):
    name, kwargs = "vit_tiny_patch16_224", ["model.image.kwargs={}", "model.image.resolution=224"]
    vit = timm.create_model(name)
    repository = timm.get_pretrained_cfg(name).hf_hub_id.replace("/", "--")
    snapshot = no_hub / f"models--{repository}" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    save_file(vit.state_dict(), snapshot / "model.safetensors")
    (no_hub / f"models--{repository}" / "refs").mkdir()
    (no_hub / f"models--{repository}" / "refs" / "main").write_text("0" * 40)
    student = build_student(load_recipe(SMALL_RECIPE, [*kwargs, f"model.image.name={name}"]))
    load_initial_weights(student, f"timm:{name}")
    assert torch.equal(student.image.vit.blocks[3].mlp.fc1.weight, vit.blocks[3].mlp.fc1.weight)
