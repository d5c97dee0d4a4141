"""Runs of image towers with registers, rotary positions or another pooling are loaded, exported and
drawn."""

import argparse

import open_clip
import pytest
import torch
from small_recipe import SMALL_RECIPE

from aclip.config.recipe_file import load_recipe
from aclip.errors import ConfigError
from aclip.evaluation.load_model import load_model
from aclip.reports.visualize import visualize
from aclip.weights.export import export

TINY = [
    "model.text={width: 16, heads: 2, layers: 1, context_length: 16}",
    "model.embed_dim=12",
    "mask.block_size=1",
]
SIZES = "patch_size: 8, embed_dim: 24, depth: 2, num_heads: 2"
NO_TEACHER = ["mask.policy=random", "teacher=null"]
ATTENTIVE = ["teacher={resolution: 32}"]
TOWERS = {
    "registers": ("vit_tiny_patch16_224", "reg_tokens: 2", ATTENTIVE),
    "mean": ("vit_tiny_patch16_224", "class_token: false, global_pool: avg", NO_TEACHER),
    "mean, not normalised after": (
        "vit_tiny_patch16_224",
        "global_pool: avg, fc_norm: false",
        NO_TEACHER,
    ),
    "pool": ("vit_tiny_patch16_224", "class_token: false, global_pool: map", ATTENTIVE),
    "rotary": ("vit_small_patch16_rope_mixed_224", "", ATTENTIVE),
    "rotary of a table": ("eva02_tiny_patch14_224", "global_pool: token", ATTENTIVE),
}
HUGGING_FACE = {
    "registers": "has no CLS token with a position, or does not pool by it",
    "mean": "has no CLS token with a position",
    "mean, not normalised after": "does not pool by it",
    "pool": "has no CLS token with a position",
    "rotary": "has rotary positions, which Hugging Face's ViT has not",
    "rotary of a table": "has rotary positions, which Hugging Face's ViT has not",
}
DRAWN = {
    "registers": "'s CLS token to each patch",
    "mean": "pools by avg: no query attends",
    "mean, not normalised after": "pools by avg: no query attends",
    "pool": "teacher's pooling query to each patch of the image, mean over heads;",
    "rotary": "'s CLS token to each patch",
    "rotary of a table": "'s CLS token to each patch",
}


def recipe_of(kind):
    name, kwargs, rest = TOWERS[kind]
    image = f"model.image={{name: {name}, resolution: 32, kwargs: {{{SIZES}, {kwargs}}}}}"
    return load_recipe(SMALL_RECIPE, [*TINY, image, *rest])


def run_export(checkpoint, out, output_format):
    export(
        argparse.Namespace(
            checkpoint=str(checkpoint), out=str(out), format=output_format, model=None
        )
    )


@pytest.mark.parametrize("kind", TOWERS)
@torch.no_grad()
def test_a_run_is_loaded_exported_and_drawn(kind, write_run, tmp_path, encode_image):
    recipe = recipe_of(kind)
    run, student, teacher = write_run(recipe, has_teacher=recipe.needs_teacher)
    model = teacher if recipe.needs_teacher else student
    pixels = torch.randn(2, 3, 32, 32)
    expected = model.encode_image(pixels)

    run_export(run, tmp_path / "open_clip", "open_clip")
    theirs = open_clip.create_model(f"local-dir:{tmp_path / 'open_clip'}").eval()
    torch.testing.assert_close(theirs.encode_image(pixels), expected, rtol=1e-5, atol=1e-5)
    run_export(run, tmp_path / "plain", "safetensors")
    for path in (run, tmp_path / "open_clip", tmp_path / "plain" / "model.safetensors"):
        loaded = load_model(str(path)).student
        torch.testing.assert_close(loaded.encode_image(pixels), expected)
    with pytest.raises(ConfigError, match=HUGGING_FACE[kind]):
        run_export(run, tmp_path / "huggingface", "huggingface")

    photo = tmp_path / "photo.jpg"
    photo.write_bytes(encode_image(50, 40))
    visualize(argparse.Namespace(checkpoint=str(run), images=[str(photo)], out=None))
    page = (run / "figure" / "figure.html").read_text().replace("&#x27;", "'")
    assert DRAWN[kind] in page
    assert ("Teacher attention: " in page) == recipe.needs_teacher


def test_positions_of_another_grid_are_resized_behind_those_of_the_prefix(write_run, tmp_path):
    run, _, teacher = write_run(recipe_of("registers"))
    run_export(run, tmp_path / "plain", "safetensors")
    path = tmp_path / "plain"
    text = (path / "recipe.yaml").read_text().replace("resolution: 32", "resolution: 64")
    (path / "recipe.yaml").write_text(text)
    loaded = load_model(str(path / "model.safetensors")).student
    positions = loaded.image.vit.pos_embed
    assert positions.shape == (1, 3 + 64, 24)
    assert torch.equal(positions[:, :3], teacher.image.vit.pos_embed[:, :3])


def test_an_open_clip_model_that_pools_otherwise_than_its_timm_model_is_refused(
    write_run, tmp_path
):
    run, *_ = write_run(recipe_of("registers"))
    run_export(run, tmp_path / "out", "open_clip")
    path = tmp_path / "out" / "open_clip_config.json"
    path.write_text(path.read_text().replace('"timm_pool": "token"', '"timm_pool": "avg"'))
    with pytest.raises(ConfigError, match="pools patches by avg, not by token as timm's local-dir"):
        load_model(str(tmp_path / "out"))
