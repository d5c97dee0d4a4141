"""launch/visualize.py on runs of every kind, written without training."""

import argparse
import re

import pytest
import torch
from PIL import Image
from small_recipe import SMALL_RECIPE

from aclip.config.recipe_file import load_recipe
from aclip.errors import ConfigError
from aclip.method.masks.policies import POLICIES
from aclip.reports.visualize import visualize

TINY = [
    "model.image.resolution=32",
    "model.image.kwargs={patch_size: 8, embed_dim: 24, depth: 2, num_heads: 2}",
    "model.text={width: 16, heads: 2, layers: 1, context_length: 16}",
    "model.embed_dim=12",
]
AT_32 = "teacher={resolution: 32}"


@pytest.fixture
def photos(tmp_path, encode_image):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(2):
        (folder / f"photo-{number}.jpg").write_bytes(encode_image(50, 40, seed=number))
    (folder / "photo-1.txt").write_text("costs <b>$5</b> & more")
    return folder


def run_visualize(*paths, out=None):
    checkpoint, *images = (str(path) for path in paths)
    visualize(argparse.Namespace(checkpoint=checkpoint, images=images, out=out))


@pytest.mark.parametrize(
    "recipe, overrides, num_columns, words",
    [
        pytest.param(
            SMALL_RECIPE, [AT_32], 5, ["Teacher attention", "8 of 16 patches"], id="A-CLIP"
        ),
        pytest.param(
            "aclip_eff_vitb16", ["teacher.resolution=16", "loss.byol_widths=[8, 4]"],
            5, ["16 x 16 pixels"], id="A-CLIP-eff",
        ),
        pytest.param(
            "clip_vitb16", [], 4,
            ["Student attention", "has no teacher", "drops no patch"], id="CLIP",
        ),
        pytest.param(
            "maskclip_vitb16", [AT_32, "distill.num_codewords=8", "mlm.decoder_layers=1"],
            4, ["Teacher attention", "drops no patch"], id="MaskCLIP",
        ),
        pytest.param(
            "random_2x50_vitb16", [], 5, ["has no teacher", "random patches"], id="random"
        ),
        pytest.param(
            "inverse_2x50_vitb16", [AT_32, "teacher.score_layers=1"],
            5, ["least attention", "heads and layers 1 to 1"], id="inverse",
        ),
        pytest.param(
            "random_2x50_vitb16", ["mask.policy=cluster", "mask.keep_ratio_end=1"],
            5, ["clusters of patches that look alike", "from 50% to 100% in the run", "8 of 16"],
            id="cluster",
        ),
        pytest.param(
            SMALL_RECIPE, [AT_32, "mask.warmup=0.125", "mask.temperature=2"],
            5, ["first 12.5 % of the run", "temperature 2; shown is one draw"], id="noise",
        ),
    ],
)  # fmt: skip
def test_any_recipe_gives_pictures_and_a_page(
    write_run, photos, monkeypatch, recipe, overrides, num_columns, words
):
    recipe = load_recipe(recipe, [*TINY, "mask.block_size=2", *overrides])
    run, *_ = write_run(recipe, has_teacher=recipe.needs_teacher)
    text = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(text.replace("compile: false", "compile: true"))
    monkeypatch.setattr("torch.compile", lambda *_: pytest.fail("compiled for a few images"))
    run_visualize(run, photos)
    page = (run / "figure" / "figure.html").read_text()
    for word in (*words, "costs &lt;b&gt;$5&lt;/b&gt; &amp; more", "photo-0"):
        assert word in page
    assert page.count("<img") == page.count('src="data:image/png;base64,') == 2 * num_columns
    assert not re.search(r"(src|href)=\"(?!data:)", page) and "object's" not in page
    names = sorted(path.name for path in (run / "figure").iterdir())
    assert names == ["figure.html", "figure.png", *(f"sample-{n}.png" for n in (1, 2))]
    with Image.open(run / "figure" / "figure.png") as figure:
        assert figure.width > num_columns * 192


def test_captions_beside_image_files_are_those_that_a_conversion_takes(
    write_run, tmp_path, encode_image
):
    run, *_ = write_run(load_recipe(SMALL_RECIPE, [*TINY, AT_32]))
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("A.JPG", "b.jpeg", "c.jpg", "d\udcff.jpg", "._A.JPG"):
        (folder / name).write_bytes(encode_image(50, 40))
    (folder / "A.TXT").write_bytes(b"caf\xe9")
    (folder / "b.txt").write_bytes("naïve".encode("utf-16"))
    (folder / "c.json").write_text('{"captions": [null, "of the json"]}')
    run_visualize(run, folder)
    page = (run / "figure" / "figure.html").read_text()
    assert re.findall("<h2>(.*?)</h2>", page) == ["café", "naïve", "of the json", "d\ufffd"]


@pytest.mark.parametrize("layers", [None, 1])
def test_attention_is_the_teachers_of_the_checkpoint(layers, write_run, photos, monkeypatch):
    seen = {}
    monkeypatch.setattr(
        "aclip.reports.kept_patches.picture_columns",
        lambda images, scores, *rest: seen.update(images=images, scores=scores) or [],
    )
    of_layers = [] if layers is None else [f"teacher.score_layers={layers}"]
    run, _, teacher = write_run(load_recipe(SMALL_RECIPE, [*TINY, AT_32, *of_layers]))
    with pytest.raises(IndexError):  # nothing to draw
        run_visualize(run, photos)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
    pixels = (torch.from_numpy(seen["images"]) / 255 - mean) / std
    with torch.no_grad():
        _, expected = teacher.image.forward_with_scores(pixels, layers)
    torch.testing.assert_close(torch.from_numpy(seen["scores"]), expected, rtol=1e-4, atol=1e-6)


def test_built_in_scenes_come_with_the_overlap(write_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ACLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("aclip.data.demo.TRAIN_SHARDS", 1)
    monkeypatch.setattr("aclip.data.demo.TRAIN_SHARD_SIZE", 1)
    monkeypatch.setattr("aclip.data.demo.VAL_SHARD", 1)
    monkeypatch.setattr("aclip.data.demo.VAL_SIZE", 24)
    run, *_ = write_run(load_recipe(SMALL_RECIPE, [*TINY, AT_32]))
    run_visualize(run, out=tmp_path / "out")
    page = (tmp_path / "out" / "figure.html").read_text()
    shares = dict(re.findall(r"<td>(\w+)</td><td>([\d.]+) %</td>", page))
    assert shares.keys() == POLICIES.keys() - {"none"}
    # Half of the blocks: what one of the two keeps, the other drops.
    assert float(shares["attentive"]) + float(shares["inverse"]) == pytest.approx(100, abs=0.2)
    assert 30 < float(shares["random"]) < 70
    assert "views of 24 images that show the object" in page
    assert len(re.findall(r"patches kept, \d+ of the object&#x27;s \d+", page)) > 8
    assert "random" in capsys.readouterr().out
    # The same scenes as the output of a command: the same page.
    (scenes,) = (tmp_path / "cache").glob("demo-*/val.tar")
    run_visualize(run, f"pipe:cat {scenes}", out=tmp_path / "piped")
    assert (tmp_path / "piped" / "figure.html").read_text() == page


@pytest.mark.parametrize(
    "paths, words",
    [
        (["{tmp}/nowhere"], ["nowhere", "neither a checkpoint"]),
        (["{run}", "{tmp}/no.jpg"], ["IMAGES is", "no.jpg", "can't be read"]),
        (["{run}", "{tmp}/no.tar"], ["IMAGES is", "no.tar"]),
        (["{run}", "{run}/recipe.yaml"], ["IMAGES is", "no usable image"]),
    ],
)
def test_what_is_not_there_ends_with_one_sentence(write_run, tmp_path, paths, words):
    run, *_ = write_run(load_recipe(SMALL_RECIPE, [*TINY, AT_32]))
    with pytest.raises(ConfigError) as caught:
        run_visualize(*(path.format(run=run, tmp=tmp_path) for path in paths))
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


def test_a_folder_that_cannot_be_written_is_named(write_run, photos, tmp_path):
    run, *_ = write_run(load_recipe(SMALL_RECIPE, [*TINY, AT_32]))
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--out is .*file/x"):
        run_visualize(run, photos, out=tmp_path / "file" / "x")
