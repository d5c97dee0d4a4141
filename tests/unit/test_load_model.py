"""What launch/evaluate.py takes: runs, and files and folders of other projects, as they are."""

import argparse
import json

import pytest
import torch
from PIL import Image
from released_model import DEMO, SMALL, inputs, released_model, save_released
from small_recipe import SMALL_RECIPE

from aclip.config.recipe_file import load_recipe
from aclip.errors import ConfigError
from aclip.evaluation.class_cache import ClassCache
from aclip.evaluation.load_model import load_model
from aclip.method.tokens import clip_tokens
from aclip.weights.export import export


@torch.no_grad()
def assert_encodes_like(loaded, image, text, side, context_length=77):
    towers = loaded.towers(torch.device("cpu"))
    assert towers.resolution == side and towers.dtype == torch.float32
    pixels, tokens = inputs(side, (3, context_length, 20))
    tokens = tokens[:, :context_length]
    for ours, theirs in (
        (towers.encode_image(pixels), image(pixels)),
        (towers.encode_text(clip_tokens(tokens)), text(tokens)),
    ):
        # The same products, summed in another order.
        assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("model", ["student", "teacher", None])
def test_run_gives_its_student_or_its_teacher(model, write_run):
    recipe = load_recipe(SMALL_RECIPE, ["loss.simclr=1", "loss.byol=2"])
    run, student, teacher = write_run(recipe)
    loaded = load_model(str(run), model)
    expected = student if model == "student" else teacher
    assert loaded.description.startswith(model or "teacher")
    assert not hasattr(loaded.student, "simclr_head"), "heads cost time and are not evaluated"
    assert_encodes_like(
        loaded, expected.encode_image, lambda ids: expected.encode_text(clip_tokens(ids)), 64, 32
    )


def test_released_checkpoint_says_itself_what_towers_it_has(tmp_path):
    model = released_model(SMALL)  # ViT-S with 12 heads, and one text layer
    path = save_released(tmp_path / "slip_small.pt", model.state_dict())
    with pytest.raises(ConfigError, match="lacks .*use the towers"):  # two blocks, not twelve
        load_model(path)
    recipe = tmp_path / "two_blocks.yaml"
    recipe.write_text(
        "model: {image: {name: vit_small_patch16_224, kwargs: {num_heads: 12, depth: 2}}, "
        "text: {layers: 1}}\nmask: {policy: none}\nloss: {simclr: 0, byol: 0}\n"
    )
    loaded = load_model(path, None, str(recipe))
    assert_encodes_like(loaded, model.encode_image, model.encode_text, 224)


def test_whole_released_checkpoint_needs_no_recipe(tmp_path):
    shape = ("vit_small_patch16_224", {"num_heads": 12, "img_size": 96}, 512, 8, 2, 64)
    model = released_model(shape)
    loaded = load_model(save_released(tmp_path / "slip_small.pt", model.state_dict()))
    assert loaded.recipe.model.text.layers == 2 and loaded.recipe.model.embed_dim == 64
    assert_encodes_like(loaded, model.encode_image, model.encode_text, 96)
    assert loaded.description.startswith("SLIP checkpoint")


def test_of_an_aclip_checkpoint_the_average_is_evaluated(tmp_path):
    average, trained = released_model(DEMO, 0), released_model(DEMO, 1)
    state = dict(average.state_dict())
    for name, tensor in trained.state_dict().items():
        if name.startswith("visual."):
            state[name] = tensor
            state[name.replace("visual.", "visual_ema.")] = average.state_dict()[name]
        elif name.startswith("transformer."):
            state[name] = tensor
            state[name.replace("transformer.", "transformer_e.")] = average.state_dict()[name]
        elif name.endswith("_projection"):
            state[name], state[f"{name}_e"] = tensor, average.state_dict()[name]
    path = save_released(tmp_path / "aclip.pt", state)
    with pytest.raises(ConfigError, match=r"of width 96 and 96.*say with --recipe"):
        load_model(path)
    recipe = tmp_path / "demo77.yaml"
    text = "text: {width: 96, heads: 3, layers: 2, context_length: 77}, embed_dim: 96"
    image = "{name: vit_tiny_patch16_224, resolution: 64, kwargs: "
    image += "{patch_size: 8, embed_dim: 96, depth: 4, num_heads: 3}}"
    recipe.write_text(
        f"model: {{image: {image}, {text}}}\nmask: {{policy: none}}\nloss: {{simclr: 0, byol: 0}}\n"
    )
    loaded = load_model(path, None, str(recipe))
    assert loaded.description.startswith("A-CLIP checkpoint")
    assert_encodes_like(loaded, average.encode_image, average.encode_text, 64)


@pytest.mark.parametrize("output_format", ["open_clip", "safetensors"])
def test_exports_come_back_with_their_preprocessing(output_format, write_run, tmp_path):
    recipe = load_recipe(SMALL_RECIPE, ["augment.mean=[0.4, 0.5, 0.6]"])
    run, _, teacher = write_run(recipe)
    out = tmp_path / "out"
    arguments = {"checkpoint": str(run), "out": str(out), "format": output_format, "model": None}
    export(argparse.Namespace(**arguments))
    files = [out / "model.safetensors"] if output_format == "safetensors" else []
    for path in (out, *files):
        loaded = load_model(str(path))
        assert_encodes_like(
            loaded, teacher.encode_image, lambda ids: teacher.encode_text(clip_tokens(ids)), 64, 32
        )
        assert loaded.recipe.augment.mean == (0.4, 0.5, 0.6)
        assert loaded.resample == Image.Resampling.BILINEAR
    if output_format == "open_clip":
        config = json.loads((out / "open_clip_config.json").read_text())
        config["preprocess_cfg"]["interpolation"] = "bicubic"
        (out / "open_clip_config.json").write_text(json.dumps(config))
        assert load_model(str(out)).resample == Image.Resampling.BICUBIC
        config["preprocess_cfg"]["resize_mode"] = "squash"
        (out / "open_clip_config.json").write_text(json.dumps(config))
        with pytest.raises(ConfigError, match="resize_mode squash"):
            load_model(str(out))


def test_what_is_no_model_is_refused_in_one_sentence(tmp_path, write_run):
    run, *_ = write_run(load_recipe(SMALL_RECIPE))
    (tmp_path / "text.pt").write_text("no weights")
    (tmp_path / "empty").mkdir()
    cases = {
        str(tmp_path / "absent"): "does not exist",
        str(tmp_path / "text.pt"): "no checkpoint that torch can read",
        str(tmp_path / "empty"): "neither an open_clip folder nor a run, but is empty",
    }
    for path, words in cases.items():
        with pytest.raises(ConfigError, match=words) as refusal:
            load_model(path)
        assert str(refusal.value).startswith(f"the checkpoint is {path}")
        assert "\n" not in str(refusal.value)
    with pytest.raises(ConfigError, match="--model is teacher, but .* is no run"):
        load_model(str(tmp_path / "text.pt"), "teacher")


def test_class_embeddings_are_cached_by_weights_and_prompts(tmp_path, write_run):
    from aclip.evaluation.sets.prompts import ClassPrompts

    run, *_ = write_run(load_recipe(SMALL_RECIPE))
    calls = []

    def embed(model, prompts):
        loaded = load_model(str(run), model)
        towers = loaded.towers(torch.device("cpu"))
        cache = ClassCache(tmp_path / "cache", loaded.student)
        encode = towers.encode_text
        object.__setattr__(towers, "encode_text", lambda t: (calls.append(1), encode(t))[1])
        with torch.no_grad():
            return cache.embed(towers, 4, prompts)

    prompts = ClassPrompts("a test", [["cat"], ["dog", "hound"]], ["a {c}.", "the {c}."])
    first = embed("teacher", prompts)
    assert len(calls) == 2  # six texts, four a batch
    assert torch.equal(embed("teacher", prompts), first) and len(calls) == 2
    other_source = ClassPrompts("elsewhere", prompts.names, prompts.templates)
    assert torch.equal(embed("teacher", other_source), first) and len(calls) == 2
    assert not torch.allclose(embed("student", prompts), first)
    assert len(calls) == 4
    swapped = ClassPrompts("a test", prompts.names[::-1], prompts.templates)
    torch.testing.assert_close(embed("teacher", swapped), first.flip(0))
    assert len(calls) == 6
    half = max((tmp_path / "cache").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    half.write_bytes(half.read_bytes()[:50])  # what a full disk leaves
    torch.testing.assert_close(embed("teacher", swapped), first.flip(0))
    assert len(calls) == 8
