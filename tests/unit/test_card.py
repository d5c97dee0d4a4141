"""The model card of an export: what it says, that its code runs, and what it must not say."""

import argparse
import contextlib
import io
import re
import runpy
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from carded_run import write_carded_run, write_results
from huggingface_hub import ModelCard
from PIL import Image
from small_recipe import SMALL_RECIPE

from aclip.config.recipe_file import load_recipe
from aclip.data.images.views import center_crop
from aclip.data.tokenizer import Tokenizer
from aclip.errors import ConfigError
from aclip.weights.card.options import CardOptions
from aclip.weights.export import export

ROOT = Path(__file__).parents[2]
FORMATS = ("open_clip", "huggingface", "safetensors")
PRIVATE = (
    'data.sources=[{shards: "/home/alice/cc3m/{000..330}.tar", weight: 3}, '
    '{shards: "s3://alice-bucket/yfcc-{00..99}.tar", weight: 1}]'
)


def write(run, out, output_format, **options):
    arguments = argparse.Namespace(
        checkpoint=str(run), out=str(out), format=output_format, model=None
    )
    export(arguments, CardOptions(**options))
    return (out / "README.md").read_text(encoding="utf-8")


def section(card, heading):
    return card.split(f"## {heading}\n\n")[1].split("\n\n## ")[0].rstrip()


@pytest.fixture
def private_run(tmp_path):
    """A run of two sources and two stages, on somebody's own data."""
    recipe = load_recipe(
        SMALL_RECIPE,
        ["data.train=[]", PRIVATE, "data.val=/home/alice/val/0.tar", "mask.policy=random"]
        + ["teacher=null", "train.average=0.99", f"train.upload_to={tmp_path}/copies"],
    )
    before = recipe.model_copy(
        update={"mask": recipe.mask.model_copy(update={"keep_ratio": 0.25, "block_size": 1})}
    )
    run, *_ = write_carded_run(tmp_path / "secret-run", recipe, before)
    write_results(run, tmp_path / "secret-sets")
    return run


def test_what_is_known_of_a_run_stands_in_its_card(private_run, tmp_path):
    costs = {0.25: 1e9, 0.5: 4e9}

    def flops(recipe, num_samples):
        assert num_samples == 100
        return costs[recipe.mask.keep_ratio]

    card = write(
        private_run,
        tmp_path / "out",
        "safetensors",
        repo="owner/first-try",
        license="cc-by-4.0",
        sample_flops=flops,
    )
    assert "\n# first-try\n" in card and "the teacher of a run" in card
    training = section(card, "Training")
    assert training.startswith("8 samples seen in 4 steps; an epoch has 100.")
    first, second = training.split("From 5 samples on:")
    assert "of each view 25 % of its single patches are kept, at random" in first
    assert "of each view 50 % of its blocks of 2 x 2 patches are kept, at random" in second
    assert "**Text tower**" in first and "**Text tower**" not in second
    # 5 samples of 1 GFLOP and 3 of 4.
    assert section(card, "Cost").startswith("1.70 x 10^10 FLOPs, that is 2.12 GFLOP a sample.")
    assert section(card, "Data") == (
        "- `cc3m/{000..330}.tar`: 90 image-caption pairs, weight 3\n"
        "- `yfcc-{00..99}.tar`: 10 image-caption pairs, weight 1"
    )
    assert section(card, "Evaluation").splitlines() == [
        "| Set | Metric | Images | % | Prompts |",
        "| --- | --- | ---: | ---: | --- |",
        "| validation set (val/0.tar) | zero-shot, top-1 | 960 | 57.2 | class names and templates "
        "beside the shards |",
        "| validation set (val/0.tar) | image to text R@1 / 5 / 10 | 960 | 10.0 / 25.0 / 40.0 |  |",
        "| ImageNet | zero-shot, top-1 | 50,000 | 43.9 | open_clip, 7 templates |",
        "| ImageNet | linear probe, top-1 | 50,000 | 70.0 |  |",
        "| mine | zero-shot, mean per class | 12 | 25.0 | classnames.txt |",
        "",
        "- ImageNet: val holds 3 folders that are empty",
    ]
    assert section(card, "Licence") == "`cc-by-4.0`"
    assert "yang2023attentive" in section(card, "Citation")
    assert "https://arxiv.org/abs/2212.00794" in section(card, "Citation")
    assert "What the mask keeps" not in card and "What differs" not in card
    assert "Earlier parts" not in card


def test_the_hub_reads_the_metadata(private_run, tmp_path):
    card = write(private_run, tmp_path / "out", "open_clip", license="mit", repo="owner/mine")
    data = ModelCard(card).data
    assert (data.library_name, data.license) == ("open_clip", "mit")
    assert data.pipeline_tag == "zero-shot-image-classification" and "clip" in data.tags
    assert data.model_name == "mine"
    found = {(e.dataset_type, e.dataset_name): (e.metric_type, e.metric_value, e.metric_name)
             for e in data.eval_results}  # fmt: skip
    assert found == {
        ("validation", "validation set (val/0.tar)"): ("accuracy", 57.25, "top-1, %"),
        ("imagenet", "ImageNet"): ("accuracy", 43.91, "top-1, %"),
        ("mine", "mine"): ("accuracy", 25.0, "mean per class, %"),
    }
    for output_format, library in (("huggingface", "transformers"), ("safetensors", "generic")):
        card = write(private_run, tmp_path / output_format, output_format)
        data = ModelCard(card).data.to_dict()
        assert data["library_name"] == library and "license" not in data
        assert section(card, "Licence").startswith("No licence was given")


@pytest.mark.parametrize("output_format", FORMATS)
def test_no_file_of_an_export_says_where_something_lies(private_run, tmp_path, output_format):
    out = tmp_path / "out"
    write(private_run, out, output_format, sample_flops=lambda *_: 1.0)
    places = [str(tmp_path), str(Path.home()), str(ROOT), "/home", "/tmp"]
    places += ["secret-run", "secret-sets", "alice-bucket"]
    for path in out.rglob("*"):
        content = b"" if path.is_dir() else path.read_bytes()
        if path.name == "open_clip_config.json":
            # Without a name on the Hub this tower can be loaded by its place alone.
            content = content.replace(f"local-dir:{out}".encode(), b"")
        for place in places:
            assert place.encode() not in content, (path.name, place)


def test_the_config_of_a_text_folder_loses_where_it_was_saved(tmp_path):
    from aclip.weights.write_export import _name_no_place

    path = tmp_path / "config.json"
    path.write_text('{"_name_or_path": "/home/alice/bert", "name_or_path": "google/bert", "a": 1}')
    _name_no_place(path)
    assert path.read_text().split() == (
        ["{", '"_name_or_path":', '"bert",', '"name_or_path":', '"google/bert",', '"a":', "1", "}"]
    )


def test_what_is_not_known_is_said_and_not_made_up(write_run, tmp_path):
    """Of a checkpoint with nothing beside it but the recipe."""
    run, *_ = write_run(load_recipe(SMALL_RECIPE, ["description=''", "data.train=/x/*.tar"]))
    card = write(run, tmp_path / "out", "safetensors", sample_flops=lambda *_: 1.0)
    assert "\n# CLIP-style model\n" in card
    assert "does not know for how many steps" in section(card, "Training")
    assert "**Mask**: `attentive`" in section(card, "Training")
    assert section(card, "Data") == "- `x/*.tar`: number of samples unknown"
    assert "does not know the FLOPs" in section(card, "Cost")
    assert section(card, "Evaluation") == "There are no results of this model."
    assert ModelCard(card).data.eval_results is None


def test_a_run_that_began_from_another_one_counts_its_own_samples(tmp_path):
    run, *_ = write_carded_run(tmp_path / "run", load_recipe(SMALL_RECIPE))
    start = '{"resume": "/gone", "checkpoint": "/gone/checkpoints/samples-000000000002"}'
    (run / "start.json").write_text(start)
    card = write(run, tmp_path / "out", "safetensors", sample_flops=lambda *_: 1e9)
    assert "began from another run's checkpoint" in section(card, "Training")
    assert "in 4 steps" not in card
    assert section(card, "Cost").startswith("6.00 x 10^9 FLOPs, for the 6 samples of this run,")
    (run / "start.json").write_text(start.replace("samples-000000000002", "best"))
    card = write(run, tmp_path / "other", "safetensors", sample_flops=lambda *_: 1e9)
    assert "does not know the FLOPs" in section(card, "Cost") and "/gone" not in card


@torch.no_grad()
def expected_scores(recipe, teacher, path):
    """The teacher's cosines of an image and both texts, and its logit scale."""
    side = recipe.model.image.resolution
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (recipe.augment.mean, recipe.augment.std))
    pixels = torch.from_numpy(center_crop(Image.open(path), side)) / 255
    image = teacher.encode_image(((pixels - mean) / std)[None])
    tokens = Tokenizer(recipe.model.text.context_length).encode(["a cat", "a dog"])
    return torch.cosine_similarity(image, teacher.encode_text(tokens))


def run_code(code, name, folder, monkeypatch):
    """What a card's code prints, with the folder in place of the name on the Hub."""
    assert name in code
    code = code.replace(f"hf-hub:{name}", f"local-dir:{folder}")
    code = re.sub(rf'from_pretrained\("{name}"\)', f'from_pretrained("{folder}")', code)
    at = {name: str(folder)}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo: at[repo])
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, file: f"{at[repo]}/{file}")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(code, "the card's code", "exec"), {})
    return printed.getvalue()


def numbers(printed):
    return torch.tensor([float(n) for n in re.findall(r"-?\d+\.\d*(?:e-?\d+)?", printed)])


WITH_BIAS = ["loss.contrastive=0", "loss.sigmoid=1"]


@pytest.mark.parametrize(
    "output_format, loss", [*((each, []) for each in FORMATS), ("open_clip", WITH_BIAS)]
)
def test_the_cards_code_gives_the_models_scores(output_format, loss, tmp_path, monkeypatch):
    recipe = load_recipe(SMALL_RECIPE, loss)
    run, student, teacher = write_carded_run(tmp_path / "run", recipe)
    monkeypatch.chdir(tmp_path)
    Image.radial_gradient("L").convert("RGB").save("image.jpg")
    card = write(run, tmp_path / "out", output_format)
    codes = re.findall(r"```python\n(.*?)```", card, re.S)
    printed = [run_code(code, "OWNER/NAME", tmp_path / "out", monkeypatch) for code in codes]
    cosines = expected_scores(recipe, teacher, "image.jpg")
    scale = student.logit_scale().detach()
    expected = (scale * cosines).softmax(dim=-1)
    if loss:
        bias = dict(student.named_parameters())["logit_bias.logit_bias"].item()
        expected = (scale * cosines + bias).sigmoid()
    if output_format == "safetensors":
        assert "'image.vit.cls_token': (1, 1, 96)" in printed.pop()
        expected = cosines
    (only,) = printed
    # As printed, four digits.
    assert torch.allclose(numbers(only), expected, atol=2e-4, rtol=2e-3), (only, expected)


def test_the_script_gives_all_that_it_is_told(tmp_path, monkeypatch):
    run, *_ = write_carded_run(tmp_path / "run", load_recipe(SMALL_RECIPE))
    out = tmp_path / "out"
    words = ["launch/export.py", str(run), "--format", "safetensors", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [*words, "--license", "apache-2.0"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "launch/export.py"), run_name="__main__")
    assert not ended.value.code
    card = (out / "README.md").read_text()
    assert ModelCard(card).data.license == "apache-2.0"
    assert re.match(r"1\.7\d x 10\^9 FLOPs, that is 0\.21\d GFLOP", section(card, "Cost"))
    # The built-in scenes' picture is shown without being asked for.
    assert "(kept-patches.webp)" in section(card, "What the mask keeps")
    red, green, _ = Image.open(out / "kept-patches.webp").getpixel((5, 5))
    assert red > 180 and green < 40
    assert section(card, "Data") == "- the built-in scenes of aclip: 100 image-caption pairs"


def test_pictures_are_shown_only_where_they_are_the_scenes_or_named(private_run, tmp_path):
    photo = tmp_path / "photo.jpg"
    exif = Image.Exif()
    exif[0x010E] = "taken at alice's house"
    Image.new("RGB", (40, 30), (10, 10, 200)).save(photo, exif=exif)
    assert b"alice" in photo.read_bytes()
    card = write(private_run, tmp_path / "out", "safetensors", picture=str(photo))
    assert "(kept-patches.webp)" in section(card, "What the mask keeps")
    content = (tmp_path / "out/kept-patches.webp").read_bytes()
    assert b"alice" not in content and Image.open(io.BytesIO(content)).size == (40, 30)
    write(private_run, tmp_path / "without", "safetensors")
    assert not (tmp_path / "without/kept-patches.webp").exists()
    # Scenes in training, but somebody's own images in the picture.
    own = load_recipe(SMALL_RECIPE, ["data.val=/x/val.tar"])
    run, *_ = write_carded_run(tmp_path / "own", own)
    write(run, tmp_path / "own-out", "safetensors")
    assert not (tmp_path / "own-out/kept-patches.webp").exists()


@pytest.mark.parametrize(
    "options, words",
    [
        ({"license": "MIT License"}, "--license is MIT License, which is no identifier"),
        ({"license": ""}, "--license is , which"),
        ({"picture": "none.png"}, r"--picture is none.png, which can't be read \(No such file"),
        ({"picture": __file__}, r"which can't be read \(it is no image\)"),
    ],
)
def test_wrong_options_are_one_sentence_and_write_nothing(private_run, tmp_path, options, words):
    with pytest.raises(ConfigError, match=words):
        write(private_run, tmp_path / "out", "safetensors", **options)
    assert not (tmp_path / "out").exists()


def test_results_that_are_something_else_are_refused(private_run, tmp_path):
    (path,) = private_run.glob("evaluation/*/results.json")
    for content in ("[]", '{"sets": {"a": {"title": "a"}}}', "{"):
        path.write_text(content)
        with pytest.raises(ConfigError, match="does not hold results of an evaluation"):
            write(private_run, tmp_path / "out", "safetensors")
    path.unlink()
    (private_run / "shards.json").write_text("[")
    with pytest.raises(ConfigError, match="shards.json is not JSON; put back"):
        write(private_run, tmp_path / "out", "safetensors")
    assert not (tmp_path / "out").exists()
