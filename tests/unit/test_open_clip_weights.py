"""Models that open_clip trained compute in aclip what they did there."""

import json

import open_clip.model
import pytest
import torch
from released_model import DEMO, inputs, released_model
from safetensors.torch import save_file
from small_recipe import SMALL_RECIPE
from torch import nn

from aclip.config.recipe_file import dump_recipe, load_recipe
from aclip.errors import ConfigError
from aclip.evaluation.load_model import load_model
from aclip.method.tokens import clip_tokens
from aclip.models.student import build_student
from aclip.weights.find_named import check_init
from aclip.weights.initial_weights import load_initial_weights

TEXT = {"context_length": 77, "vocab_size": 49408, "width": 96, "heads": 3, "layers": 2}
OWN_VIT = {"image_size": 64, "patch_size": 8, "layers": 2, "width": 128}
RECIPE = ["model.text.context_length=77"]
OWN_VIT_RECIPE = [
    *RECIPE,
    "model.image.name=vit_base_patch16_clip_quickgelu_224",
    "model.image.kwargs={patch_size: 8, embed_dim: 128, depth: 2, num_heads: 2}",
]


def student_of(overrides=RECIPE):
    return build_student(load_recipe(SMALL_RECIPE, list(overrides))).eval()


@pytest.fixture(scope="module")
def with_timm():
    """(state, model) with timm's image tower: open_clip's names, and what the model computes."""
    model = released_model(DEMO)
    state = {}
    for name, tensor in model.state_dict().items():
        if name == "image_projection":
            state["visual.head.proj.weight"] = tensor.t().contiguous()
        else:
            state[name.replace("visual.", "visual.trunk.", 1)] = tensor
    return state, model


def save_as_open_clip_does(path, state):
    """As open_clip's training loop: epoch, name, weights, optimizer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(3))]).state_dict()
    content = {"epoch": 3, "name": "a-run", "state_dict": state, "optimizer": optimizer}
    torch.save(content, path)
    return str(path)


@torch.no_grad()
def assert_same(student, image, text):
    pixels, tokens = inputs(64, (3, 77, 20))
    for ours, theirs in (
        (student.encode_image(pixels), image(pixels)),
        (student.encode_text(clip_tokens(tokens)), text(tokens)),
    ):
        assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


@pytest.mark.parametrize(
    "rename",
    [
        pytest.param(lambda name: name, id="plain"),
        pytest.param(lambda name: f"module.{name}", id="distributed"),
        pytest.param(lambda name: f"_orig_mod.{name}", id="compiled"),
        pytest.param(lambda name: f"module._orig_mod.{name}", id="compiled, then distributed"),
        pytest.param(lambda name: f"_orig_mod.module.{name}", id="distributed, then compiled"),
        pytest.param(
            lambda name: name.replace("trunk.", "trunk._orig_mod."), id="a part of it compiled"
        ),
        pytest.param(lambda name: f"model.{name}", id="Lightning"),
    ],
)
def test_training_checkpoint_of_open_clip_is_loaded(with_timm, rename, tmp_path):
    state, model = with_timm
    renamed = {rename(name): tensor for name, tensor in state.items()}
    path = save_as_open_clip_does(tmp_path / "epoch_3.pt", renamed)
    student = student_of()
    report = load_initial_weights(student, path)
    assert_same(student, model.encode_image, model.encode_text)
    assert report.layout.startswith("open_clip checkpoint, with the recipe's heads and activations")
    assert report.used == sorted(state)
    check_init(path)


def test_open_clips_own_image_tower_computes_the_same(tmp_path):
    torch.manual_seed(0)
    model = open_clip.model.CLIP(96, OWN_VIT, TEXT, quick_gelu=True).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    path = save_as_open_clip_does(tmp_path / "epoch_1.pt", model.state_dict())
    student = student_of(OWN_VIT_RECIPE)
    load_initial_weights(student, path)
    assert_same(student, model.encode_image, model.encode_text)
    with pytest.raises(ConfigError, match=r"does not tell its towers.*--recipe"):
        load_model(path)
    recipe = tmp_path / "towers.yaml"
    recipe.write_text(dump_recipe(load_recipe(SMALL_RECIPE, OWN_VIT_RECIPE)))
    loaded = load_model(path, recipe_name=str(recipe))
    assert_same(loaded.student, model.encode_image, model.encode_text)
    config = {"embed_dim": 96, "quick_gelu": True, "vision_cfg": OWN_VIT, "text_cfg": TEXT}
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    again = student_of(OWN_VIT_RECIPE)
    load_initial_weights(again, str(folder))
    assert_same(again, model.encode_image, model.encode_text)
    other = student_of([each.replace("_quickgelu", "") for each in OWN_VIT_RECIPE])
    with pytest.raises(ConfigError, match="has QuickGELU, but the recipe's has GELU"):
        load_initial_weights(other, str(folder))


def test_open_clips_run_tells_what_its_checkpoint_does_not(with_timm, tmp_path, monkeypatch):
    path = save_as_open_clip_does(tmp_path / "checkpoints" / "epoch_3.pt", with_timm[0])
    (tmp_path / "params.txt").write_text("lr: 0.001\nmodel: mine\nforce_quick_gelu: False\n")
    vision = {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "token"}
    config = {"embed_dim": 96, "quick_gelu": True, "vision_cfg": vision, "text_cfg": TEXT}
    monkeypatch.setattr("open_clip.factory.get_model_config", lambda name: dict(config))
    report = load_initial_weights(student_of(), path)
    assert report.layout == "open_clip checkpoint"
    del config["quick_gelu"]
    with pytest.raises(ConfigError, match="text tower that is not CLIP's with QuickGELU"):
        load_initial_weights(student_of(), path)
    (tmp_path / "params.txt").write_text("model: mine\nforce_quick_gelu: True\n")
    load_initial_weights(student_of(), path)
