"""Exports: what open_clip and transformers compute of one is what aclip's towers compute."""

import argparse
import json
import os

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from small_recipe import SMALL_RECIPE
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    VisionTextDualEncoderModel,
    VisionTextDualEncoderProcessor,
)

from aclip.config.recipe_file import load_recipe
from aclip.data.images.views import center_crop
from aclip.data.tokenizer import Tokenizer
from aclip.errors import ConfigError
from aclip.models.student import build_student
from aclip.weights.export import export
from aclip.weights.formats import huggingface
from aclip.weights.formats.huggingface_tokenizer import AMPERSANDS, ENTITIES, build_tokenizer

SMALL = ["model.text.layers=2", "loss.simclr=0", "loss.byol=0"]
TOWERS = {
    "demo": ("demo", []),
    "demo at another resolution": ("demo", ["model.image.resolution=96"]),
    "ViT-S/16 with 12 heads": ("aclip_vits16", SMALL),
    "ViT-B/16": ("aclip_vitb16", SMALL),
}
CAPTIONS = ["a red circle", "two dogs, one ball", "x", "Ünïcode & more " * 5]


def run_export(checkpoint, out, output_format, model=None):
    export(
        argparse.Namespace(
            checkpoint=str(checkpoint), out=str(out), format=output_format, model=model
        )
    )


def assert_same(actual, expected):
    """Within 1e-5 of the largest value: the same products, summed in another order."""
    assert (actual - expected).abs().max() < 1e-5 * max(1, expected.abs().max())


def pixels_of(recipe):
    side = recipe.model.image.resolution
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def assert_open_clip_computes(folder, recipe, model):
    theirs = open_clip.create_model(f"local-dir:{folder}").eval()
    pixels = pixels_of(recipe)
    assert_same(theirs.encode_image(pixels), model.encode_image(pixels))
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(CAPTIONS)
    ours = Tokenizer(recipe.model.text.context_length).encode(CAPTIONS)
    assert_same(theirs.encode_text(tokens), model.encode_text(ours))


@torch.no_grad()
def assert_transformers_computes(folder, recipe, model):
    theirs = VisionTextDualEncoderModel.from_pretrained(folder).eval()
    pixels = pixels_of(recipe)
    assert_same(theirs.get_image_features(pixels).pooler_output, model.encode_image(pixels))
    tokens = AutoTokenizer.from_pretrained(folder)(
        CAPTIONS, padding=True, truncation=True, return_tensors="pt"
    )
    ours = Tokenizer(recipe.model.text.context_length).encode(CAPTIONS)
    features = theirs.get_text_features(**tokens).pooler_output
    assert_same(features, model.encode_text(ours))


@pytest.mark.parametrize("name", TOWERS)
def test_exported_towers_compute_what_aclip_computes(name, write_run, tmp_path):
    recipe_name, overrides = TOWERS[name]
    recipe = load_recipe(recipe_name, overrides)
    run, student, teacher = write_run(recipe)
    # Of the teacher, the default; its logit scale is the student's.
    run_export(run, tmp_path / "open_clip", "open_clip")
    assert_open_clip_computes(tmp_path / "open_clip", recipe, teacher)
    config = json.loads((tmp_path / "open_clip/open_clip_config.json").read_text())
    timm_name = config["model_cfg"]["vision_cfg"]["timm_model_name"]
    # A tower that timm's name alone describes names no folder.
    is_portable = name == "ViT-B/16"
    assert timm_name == recipe.model.image.name if is_portable else "local-dir" in timm_name
    assert (tmp_path / "open_clip/config.json").exists() != is_portable
    run_export(run, tmp_path / "huggingface", "huggingface", "student")
    assert_transformers_computes(tmp_path / "huggingface", recipe, student)
    if recipe_name == "demo":
        run_export(run, tmp_path / "student", "open_clip", "student")
        assert_open_clip_computes(tmp_path / "student", recipe, student)
        run_export(run, tmp_path / "teacher", "huggingface", "teacher")
        assert_transformers_computes(tmp_path / "teacher", recipe, teacher)
    scale = student.logit_scale.log_logit_scale.item()
    for folder, key in (("open_clip", "logit_scale"), ("huggingface", "logit_scale")):
        (file,) = (tmp_path / folder).glob("*model.safetensors")
        assert load_file(file)[key].item() == pytest.approx(scale)


def test_a_moved_folder_of_another_tower_is_refused_by_open_clip_not_read_as_another_tower(
    write_run, tmp_path
):
    run, *_ = write_run(load_recipe(SMALL_RECIPE))
    run_export(run, tmp_path / "out", "open_clip")
    os.rename(tmp_path / "out", tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match="config.json"):
        open_clip.create_model(f"local-dir:{tmp_path / 'moved'}")


def test_plain_export_holds_the_model_and_its_recipe(write_run, tmp_path, capsys):
    recipe = load_recipe(SMALL_RECIPE, ["loss.simclr=1", "loss.byol=2"])
    run, _, teacher = write_run(recipe)
    run_export(run, tmp_path / "out", "safetensors")
    weights = load_file(tmp_path / "out/model.safetensors")
    ours = dict(teacher.named_parameters())
    heads = {name for name in ours if "simclr" in name or "byol" in name}
    assert heads and weights.keys() == ours.keys() - heads
    scale = weights.pop("logit_scale.log_logit_scale")
    assert scale.shape == (1,)
    assert all(torch.equal(weights[name], ours[name]) for name in weights)
    assert load_recipe(str(tmp_path / "out/recipe.yaml")) == recipe
    printed = capsys.readouterr().out
    assert "teacher" in printed and "load_file" in printed and str(tmp_path / "out") in printed


@torch.no_grad()
def test_vit_large_computes_the_same_in_transformers(tmp_path):
    """Without a checkpoint on the disk, whose gigabytes would take most of a minute."""
    recipe = load_recipe("aclip_vitl16", ["model.text.layers=1", "loss.simclr=0", "loss.byol=0"])
    with torch.device("meta"):
        student = build_student(recipe)
    student.to_empty(device="cpu").eval()
    for parameter in student.parameters():
        parameter.normal_(0, 0.03)
    huggingface.write(tmp_path, recipe, student, dict(student.named_parameters()))
    assert_transformers_computes(tmp_path, recipe, student)


# Resized and cut to 64 px: exact, enlarged, extreme, and every remainder of the part cut off.
SIZES = [(64, 64), (17, 23), (640, 480), (97, 331), (70, 64), (64, 67), (1000, 31), (65, 66)]


def noise(width, height):
    rng = np.random.default_rng(width * height)
    smooth = Image.fromarray(rng.integers(0, 256, (6, 5, 3), dtype=np.uint8))
    pixels = np.asarray(smooth.resize((width, height))).astype(int)
    pixels = pixels + rng.integers(-40, 40, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def levels(normalised, recipe):
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (recipe.augment.mean, recipe.augment.std))
    return (normalised * std + mean) * 255


def test_preprocessing_is_aclips_evaluation_preprocessing(write_run, tmp_path):
    recipe = load_recipe(SMALL_RECIPE, ["augment.mean=[0.4, 0.5, 0.6]"])
    run, *_ = write_run(recipe)
    run_export(run, tmp_path / "open_clip", "open_clip")
    run_export(run, tmp_path / "huggingface", "huggingface")
    *_, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'open_clip'}")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "huggingface")
    for width, height in SIZES:
        image = noise(width, height)
        expected = torch.from_numpy(center_crop(image, 64))
        theirs = levels(preprocess(image), recipe)
        assert (theirs - expected).abs().max() < 1.01, (width, height)
        short = min(width, height)
        excess = 64 * max(width, height) // short - 64
        if excess % 4 == 3:
            # transformers rounds half a pixel down, torchvision to even: one pixel apart.
            expected = floor_crop(image, 64)
        theirs = levels(processor(image, return_tensors="pt").pixel_values[0], recipe)
        assert (theirs - expected).abs().max() < 1.01, (width, height)
    gray = processor(noise(80, 70).convert("L"), return_tensors="pt").pixel_values
    assert gray.shape == (1, 3, 64, 64)


def floor_crop(image, side):
    short = min(image.size)
    size = [side * length // short for length in image.size]
    left, top = ((length - side) // 2 for length in size)
    resized = image.resize(size, Image.Resampling.BILINEAR)
    cut = resized.crop((left, top, left + side, top + side))
    return torch.from_numpy(np.array(cut)).permute(2, 0, 1)


NAMED_DIFFERENCES = {
    "Ã©": "`Ã©` for `é`",
    "&#233;": "`&#233;`",
    "&copy 2020": "`&copy 2020`",
    "&alpha;": "`&alpha;`",
    "ｶﾞ": "half-width katakana",
    "a\x85b": "control characters of Windows",
    "<b> &ldquo;x&rdquo;": "a curly quote that is an entity beside a `<`",
}
"""What a tokenizer.json can't clean, and how the card names it."""
PARTS = [
    "A Dog's day — it's  fine", "naïve café", "cafe\u0301", "日本語の写真", "Привет, мир!",
    "🐶🔥 emoji",
    "👩‍👩‍👧‍👦 family", "Tom &amp; Jerry", "5 &lt; 6 &quot;q&quot;", "&amp;lt;b&amp;gt;", "it&#39;s",
    "a&nbsp;b", "<b>bold</b>", "“curly” ‘quotes’", "tabs\tand\nlines", "1234567890", "C++ / C#",
    "ＡＢＣ", "ﬁne ﬂow", "don't'll've", "…", "x" * 80, "ΑΒΓ δ", "Straße", "a\u200bb", "\ufeffbom",
    "50% off!!!", "http://a.b/c?d=e&f=g", "<start_of_text>", "a <end_of_text> b", "<|endoftext|>",
    "ΣΟΦΌΣ", "Caf&eacute; &ndash; &ldquo;hi&rdquo;", "&AMP;amp;", "（ｏｋ）！", "5&euro;",
    *NAMED_DIFFERENCES,
    "\u00a0", "مرحبا", "नमस्ते", "İstanbul", "null\x00byte", "&eacute;t&eacute;", "Ã©tÃ©", "'s", "㍿",
]  # fmt: skip


def captions():
    """200 of them: each part alone, pairs, long rows, and nearly nothing."""
    rng = np.random.default_rng(0)
    rows = [*PARTS, "", " ", "\n", ".", "a " * 200, "word " * 74, "word " * 75, "word " * 76]
    while len(rows) < 200:
        chosen = rng.choice(len(PARTS), int(rng.integers(2, 9)))
        rows.append(" ".join(PARTS[i] for i in chosen))
    return rows


def as_rows(tokens):
    """Each caption's ids up to its end token."""
    return [row[: row.index(49407) + 1] if 49407 in row else row for row in tokens.tolist()]


def section(card, heading):
    return card.split(f"## {heading}\n\n")[1].split("\n\n## ")[0]


def test_entities_and_full_width_signs_are_resolved_as_in_training():
    normalise = build_tokenizer(77).backend_tokenizer.normalizer.normalize_str
    clean = open_clip.tokenizer.get_clean_fn("lower")
    signs = [f"&{name};" for name in (*AMPERSANDS, *ENTITIES)]
    signs += [chr(code) for code in range(0xFF01, 0xFF5F)]
    assert len(signs) > 250
    # ftfy takes these two, before a space, for letters that were decoded wrongly.
    for sign in set(signs) - {"&Acirc;", "&Atilde;"}:
        row = f"A {sign} b x{sign}y"
        assert normalise(row) == clean(row), row


def test_200_odd_captions_get_the_same_tokens(write_run, tmp_path):
    run, *_ = write_run(load_recipe(SMALL_RECIPE, ["model.text.context_length=77"]))
    run_export(run, tmp_path / "open_clip", "open_clip")
    run_export(run, tmp_path / "huggingface", "huggingface")
    rows = captions()
    ours = Tokenizer(77).encode(rows).ids
    theirs = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'open_clip'}")(rows)
    assert torch.equal(theirs[:, : ours.shape[1]], ours) and not theirs[:, ours.shape[1] :].any()

    tokenizer = VisionTextDualEncoderProcessor.from_pretrained(tmp_path / "huggingface").tokenizer
    plain = tokenizer(rows, truncation=True, padding="max_length", return_tensors="pt").input_ids
    assert plain.shape == (200, 77)
    differing = {
        row
        for row, ids, expected in zip(rows, as_rows(plain), as_rows(ours), strict=True)
        if ids != expected
    }
    beside = {row for row in rows if "<" in row and "&ldquo;" in row}
    unnamed = {row for row in differing if not any(part in row for part in NAMED_DIFFERENCES)}
    assert unnamed <= beside
    card = (tmp_path / "huggingface/README.md").read_text()
    for part, words in NAMED_DIFFERENCES.items():
        assert part in differing and words in section(card, "What differs from training")
    assert "What differs" not in (tmp_path / "open_clip/README.md").read_text()
    clean = open_clip.tokenizer.get_clean_fn("lower")
    cleaned = tokenizer([clean(row) for row in rows], truncation=True, padding="max_length")
    pairs = zip(rows, as_rows(torch.tensor(cleaned.input_ids)), as_rows(ours), strict=True)
    assert {row for row, ids, expected in pairs if ids != expected} <= beside


def test_refusals_are_one_sentence_and_leave_nothing_behind(write_run, tmp_path):
    run, *_ = write_run(load_recipe(SMALL_RECIPE), has_teacher=False)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    cases = [
        (run, tmp_path / "full", "open_clip", None, "not empty"),
        (run, tmp_path / "file", "open_clip", None, "is a file"),
        (run, tmp_path / "file/sub", "open_clip", None, "can't be written"),
        (run, tmp_path / "out", "open_clip", "teacher", "--model student"),
        (tmp_path / "none", tmp_path / "out", "open_clip", None, "neither a checkpoint"),
    ]
    for checkpoint, out, output_format, model, words in cases:
        with pytest.raises(ConfigError, match=words):
            run_export(checkpoint, out, output_format, model)
    run_export(run, tmp_path / "empty", "safetensors")  # an empty folder is as good as none
    assert {path.name for path in tmp_path.iterdir()} == {"run", "full", "file", "empty"}


def test_damaged_checkpoints_and_foreign_recipes_are_refused(write_run, tmp_path):
    run, *_ = write_run(load_recipe(SMALL_RECIPE))
    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(
        recipe.replace("embed_dim: 96\n  init", "embed_dim: 48\n  init")
    )
    with pytest.raises(ConfigError, match=r"image_projection.weight of shape \[96, 96\]"):
        run_export(run, tmp_path / "out", "open_clip")
    (run / "recipe.yaml").unlink()
    with pytest.raises(ConfigError, match="recipe.yaml is needed"):
        run_export(run, tmp_path / "out", "open_clip")
    (run / "recipe.yaml").write_text(recipe)
    file = run / "checkpoints/samples-000000000008/teacher.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ConfigError, match=r"teacher.safetensors has \d+ bytes"):
        run_export(run, tmp_path / "out", "open_clip")
    run_export(run, tmp_path / "out", "open_clip", "student")


@pytest.mark.parametrize(
    "kwargs, words",
    [
        ("init_values: 0.1", "ls1.gamma"),
        ("qk_norm: true", "k_norm"),
        ("pre_norm: true", "norm_pre"),
    ],
)
def test_towers_that_hugging_faces_vit_cant_hold_are_refused(kwargs, words, write_run, tmp_path):
    tower = f"{{patch_size: 8, embed_dim: 96, depth: 2, num_heads: 3, {kwargs}}}"
    recipe = load_recipe(SMALL_RECIPE, [f"model.image.kwargs={tower}"])
    run, _, teacher = write_run(recipe)
    with pytest.raises(ConfigError, match=words):
        run_export(run, tmp_path / "out", "huggingface")
    run_export(run, tmp_path / "out", "open_clip")
    assert_open_clip_computes(tmp_path / "out", recipe, teacher)
