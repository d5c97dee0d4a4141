"""Starting weights: files of other projects compute in aclip what they compute at home."""

import argparse
import json
import os
import pickle

import pytest
import timm
import torch
from released_model import DEMO, SMALL, inputs, released_model, save_released
from safetensors.torch import save_file
from small_recipe import SMALL_RECIPE
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import nn

from aclip.config.recipe_file import load_recipe
from aclip.errors import ConfigError
from aclip.method.tokens import clip_tokens
from aclip.models.student import build_student
from aclip.weights.export import export
from aclip.weights.initial_weights import load_initial_weights

DEMO_RECIPE = ["model.text.context_length=77"]
ONE_LAYER = ["model.image.kwargs={num_heads: 12, depth: 2}", "model.text.layers=1"]


def image_mlp():
    return {
        "image_mlp.layer1.weight": torch.zeros(4, 3),
        "image_mlp.bn1.running_mean": torch.zeros(4),
        "image_mlp.bn1.num_batches_tracked": torch.tensor(7),
    }


@torch.no_grad()
def assert_same_outputs(student, model, side, lengths=(3, 77, 20)):
    student.eval()
    pixels, tokens = inputs(side, lengths)
    expected = model.encode_image(pixels), model.encode_text(tokens)
    actual = student.encode_image(pixels), student.encode_text(clip_tokens(tokens))
    for ours, theirs in zip(actual, expected, strict=True):
        # The same products, summed in another order.
        assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


@pytest.mark.parametrize(
    "recipe_name, overrides, shape, side",
    [
        (SMALL_RECIPE, [*DEMO_RECIPE, "loss.simclr=1"], DEMO, 64),
        ("slip_vits16", ONE_LAYER, SMALL, 224),
    ],
)
def test_slip_checkpoint_computes_the_same(recipe_name, overrides, shape, side, tmp_path):
    model = released_model(shape)
    path = save_released(tmp_path / "slip.pt", model.state_dict() | image_mlp())
    student = build_student(load_recipe(recipe_name, overrides))
    head = student.simclr_head[0].weight.detach().clone()
    report = load_initial_weights(student, path)
    assert_same_outputs(student, model, side)
    assert student.logit_scale.log_logit_scale.item() == model.logit_scale.item()
    assert torch.equal(student.simclr_head[0].weight, head)
    assert report.layout == "SLIP checkpoint"
    assert report.used == sorted(model.state_dict())
    assert report.ignored == sorted(image_mlp())
    assert report.resized == []
    assert report.random and all(name.startswith("simclr_head") for name in report.random)
    assert f"{len(report.used)} keys used, 0 of them resized, 3 ignored" in report.summary()
    assert json.loads(json.dumps(report.to_dict()))["used"] == report.used


def aclip_state(trained, average):
    """A-CLIP's layout: the average beside the trained weights, the rest of the text shared."""
    state = trained.state_dict() | image_mlp()
    for name, tensor in average.state_dict().items():
        if name.startswith("visual."):
            state[name.replace("visual.", "visual_ema.", 1)] = tensor
        elif name.startswith("transformer."):
            state[name.replace("transformer.", "transformer_e.", 1)] = tensor
        elif name in ("image_projection", "text_projection"):
            state[name + "_e"] = tensor
    for name in ("im_proj_byol", "im_proj_byol_e", "im_pred_byol"):
        state[f"{name}.0.weight"] = torch.zeros(4, 3)
    return state


def test_aclip_checkpoint_starts_from_its_average(tmp_path):
    trained, average = released_model(DEMO, 0), released_model(DEMO, 1)
    path = save_released(tmp_path / "aclip.pt", aclip_state(trained, average))
    student = build_student(load_recipe(SMALL_RECIPE, DEMO_RECIPE))
    report = load_initial_weights(student, path)
    for name in ("token_embedding", "ln_final"):  # these have no average
        getattr(average, name).load_state_dict(getattr(trained, name).state_dict())
    average.positional_embedding.data.copy_(trained.positional_embedding)
    assert_same_outputs(student, average, 64)
    assert report.layout == "A-CLIP checkpoint"
    assert "visual_ema.cls_token" in report.used and "visual.cls_token" in report.ignored
    assert {"im_proj_byol_e.0.weight", "image_projection"} <= set(report.ignored)
    assert not set(report.used) & set(report.ignored)


def test_positions_are_resized_to_another_grid_and_cut_to_a_shorter_context(tmp_path):
    model = released_model(DEMO)
    path = save_released(tmp_path / "slip.pt", model.state_dict())
    overrides = ["model.image.resolution=96", "teacher.resolution=96"]
    student = build_student(load_recipe(SMALL_RECIPE, overrides))
    report = load_initial_weights(student, path)
    assert report.resized == ["positional_embedding", "visual.pos_embed"]
    larger = timm.create_model(DEMO[0], num_classes=0, **{**DEMO[1], "img_size": 96}).eval()
    larger.load_state_dict(checkpoint_filter_fn(model.visual.state_dict(), larger))
    model.visual = larger
    assert_same_outputs(student, model, 96, lengths=(3, 32, 20))  # the small recipe's context is 32


@pytest.mark.parametrize("suffix", ["pth", "safetensors", "nested"])
def test_timm_file_starts_the_image_tower_alone(suffix, tmp_path):
    torch.manual_seed(0)
    vit = timm.create_model(DEMO[0], num_classes=10, **DEMO[1]).eval()
    nn.init.normal_(vit.pos_embed)
    path = tmp_path / f"vit.{suffix}"
    state = vit.state_dict()
    if suffix == "safetensors":
        save_file(state, path)
    else:
        torch.save({"model": state} if suffix == "nested" else state, path)
    recipe = load_recipe(SMALL_RECIPE)
    student, untouched = build_student(recipe).eval(), build_student(recipe)
    report = load_initial_weights(student, f"timm:{path}")
    pixels, _ = inputs(64)
    with torch.no_grad():
        expected = vit.forward_head(vit.forward_features(pixels), pre_logits=True)
        torch.testing.assert_close(student.image(pixels), expected, rtol=1e-5, atol=1e-5)
    assert report.ignored == ["head.bias", "head.weight"]
    assert "text_projection.weight" in report.random and "image_projection.weight" in report.random
    fresh = dict(untouched.named_parameters())
    ours = dict(student.named_parameters())
    assert all(torch.equal(ours[name], fresh[name]) for name in report.random)


def test_a_locked_tower_that_gets_no_weights_is_refused(tmp_path):
    path = tmp_path / "vit.pth"
    torch.save(timm.create_model(DEMO[0], num_classes=0, **DEMO[1]).state_dict(), path)
    image = build_student(load_recipe(SMALL_RECIPE, ["optimizer.image={lr_scale: 0}"]))
    load_initial_weights(image, f"timm:{path}")
    text = build_student(load_recipe(SMALL_RECIPE, ["optimizer.text={lr_scale: 0}"]))
    with pytest.raises(ConfigError, match=r"has no text\..* but the recipe locks it"):
        load_initial_weights(text, f"timm:{path}")
    text.text.pretrained = True  # as a folder's tower may be
    load_initial_weights(text, f"timm:{path}")


@pytest.mark.parametrize("output_format", ["open_clip", "safetensors", "run"])
def test_own_exports_and_runs_come_back_exactly(output_format, write_run, tmp_path):
    recipe = load_recipe(SMALL_RECIPE, ["loss.byol=2"])
    run, _, teacher = write_run(recipe)
    init = run
    if output_format != "run":
        out = tmp_path / "out"
        arguments = {"checkpoint": str(run), "out": str(out), "format": output_format}
        export(argparse.Namespace(**arguments, model="teacher"))
        init = out / "model.safetensors" if output_format == "safetensors" else out
    student = build_student(load_recipe(SMALL_RECIPE, ["loss.byol=2", "train.seed=5"]))
    report = load_initial_weights(student, str(init))
    ours, theirs = dict(student.named_parameters()), dict(teacher.named_parameters())
    loaded = ours.keys() - set(report.random)
    assert all(torch.equal(ours[n], theirs[n]) for n in loaded if not n.startswith("logit_scale"))
    assert all(name.startswith("byol") for name in report.random)
    other_heads = "{patch_size: 8, embed_dim: 96, depth: 4, num_heads: 6}"
    student = build_student(load_recipe(SMALL_RECIPE, [f"model.image.kwargs={other_heads}"]))
    with pytest.raises(ConfigError, match=r"has 3 heads.*num_heads=3"):
        load_initial_weights(student, str(init))


class RunsCode:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_wrong_files_are_refused_in_one_sentence_and_change_nothing(tmp_path):
    state = released_model(DEMO).state_dict()
    student = build_student(load_recipe(SMALL_RECIPE, DEMO_RECIPE))
    before = {name: p.detach().clone() for name, p in student.named_parameters()}

    def without(*names):
        return {name: tensor for name, tensor in state.items() if name not in names}

    whole = save_released(tmp_path / "whole.pt", state)
    files = {
        "empty.pt": b"",
        "text.pt": b"these are no weights\n" * 50,
        "zeros.pt": bytes(1000),
        "noise.pt": bytes(range(256)) * 20,
        "cut.pt": (tmp_path / "whole.pt").read_bytes()[:-5000],
        "noise.safetensors": bytes(range(256)) * 20,
        "code2.pkl": pickle.dumps({"state_dict": RunsCode(tmp_path / "ran")}, protocol=2),
        "code5.pkl": pickle.dumps({"state_dict": RunsCode(tmp_path / "ran")}, protocol=5),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    torch.save({"state_dict": RunsCode(tmp_path / "ran")}, tmp_path / "code.pt")
    torch.save({"epoch": 3}, tmp_path / "no_weights.pt")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    (tmp_path / "folder").mkdir()
    (tmp_path / "native").mkdir()
    native = {"model_cfg": {"quick_gelu": True, "vision_cfg": {"layers": 12}, "text_cfg": {}}}
    (tmp_path / "native/open_clip_config.json").write_text(json.dumps(native))
    mlp = "transformer.resblocks.1.mlp.c_fc.bias"
    wide = {"visual.norm.weight": torch.zeros(97), "ln_final.bias": torch.zeros(96, 1)}
    cases = {
        save_released(tmp_path / "a.pt", without(mlp)): "lacks text.transformer.encoder",
        save_released(tmp_path / "b.pt", state | {"visual.more": torch.zeros(1)}): "visual.more",
        save_released(tmp_path / "c.pt", state | {"decoder.bias": torch.zeros(1)}): "decoder.bias",
        save_released(tmp_path / "d.pt", state | wide): r"\[97\], but the recipe builds \[96\]",
        save_released(tmp_path / "e.pt", {"fc.weight": torch.zeros(1)}): "no known layout",
        save_released(
            tmp_path / "f.pt", state | {"text_projection": torch.zeros(2, 3, 4)}
        ): "text_projection",
        save_released(tmp_path / "g.pt", state | {"logit_scale": torch.zeros(4)}): "logit_scale is",
        str(tmp_path / "empty.pt"): "no checkpoint",
        str(tmp_path / "text.pt"): "no checkpoint",
        str(tmp_path / "zeros.pt"): "no checkpoint",
        str(tmp_path / "noise.pt"): "no checkpoint",
        str(tmp_path / "cut.pt"): "no checkpoint",
        str(tmp_path / "noise.safetensors"): "no safetensors",
        str(tmp_path / "code.pt"): "could run code",
        str(tmp_path / "code2.pkl"): "could run code",
        str(tmp_path / "code5.pkl"): "no checkpoint",
        str(tmp_path / "no_weights.pt"): "no weights",
        str(tmp_path / "tensor.pt"): "no weights",
        str(tmp_path / "absent.pt"): "does not exist",
        str(tmp_path / "folder"): "neither an open_clip folder nor a run",
        str(tmp_path / "native"): "holds open_clip_config.json, but no open_clip_model",
        "timm:vit_bass_patch16": "neither a file nor a model",
        f"timm:{whole}": "positional_embedding, which no part of",
    }
    for init, words in cases.items():
        with pytest.raises(ConfigError, match=words) as refusal:
            load_initial_weights(student, init)
        message = str(refusal.value)
        assert message.startswith(f"--init is {init}") and "\n" not in message
    assert not (tmp_path / "ran").exists()
    assert all(torch.equal(p, before[name]) for name, p in student.named_parameters())


def test_small_tower_with_another_number_of_heads_than_the_released_one_is_refused(tmp_path):
    """The shapes agree, so that nothing else would tell."""
    path = save_released(tmp_path / "slip.pt", released_model(SMALL).state_dict())
    overrides = ["model.image.kwargs={depth: 2}", "model.text.layers=1"]
    student = build_student(load_recipe("slip_vits16", overrides))
    with pytest.raises(ConfigError, match=r"12 heads.*builds 6.*num_heads=12"):
        load_initial_weights(student, path)
