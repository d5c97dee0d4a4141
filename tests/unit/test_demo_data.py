"""The demo data: whole, reproducible, balanced, and true about where the object is."""

import importlib.util
import io
import json
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from aclip.data import demo, scenes
from aclip.data.members import read_captions
from aclip.data.shards.listing import Shard, index_shards, read_shard
from aclip.errors import ConfigError

NUM_CLASSES = 24


@pytest.fixture(autouse=True)
def small(tmp_path, monkeypatch):
    """Two train shards of 30 scenes, two validation scenes a class; forked writers inherit it."""
    monkeypatch.setenv("ACLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(demo, "TRAIN_SHARDS", 2)
    monkeypatch.setattr(demo, "VAL_SHARD", 2)
    monkeypatch.setattr(demo, "TRAIN_SHARD_SIZE", 30)
    monkeypatch.setattr(demo, "VAL_PER_CLASS", 2)


def read_samples(url: str) -> list:
    (shard,) = index_shards([url])
    return [sample for _, sample in read_shard(shard)]


def test_the_folder_holds_listed_shards_class_names_and_prompts():
    data = demo.ensure_demo_data()
    assert index_shards(data.train) == [Shard(url, 30) for url in data.train]
    assert index_shards(data.val) == [Shard(data.val[0], 48)]
    assert {path.name for path in data.folder.iterdir()} == {
        "train-00.tar",
        "train-01.tar",
        "val.tar",
        "sizes.json",
        "classnames.txt",
        "zeroshot_classification_templates.txt",
    }
    names = (data.folder / "classnames.txt").read_text().splitlines()
    assert len(set(names)) == NUM_CLASSES
    prompts = (data.folder / "zeroshot_classification_templates.txt").read_text().splitlines()
    assert prompts and all(prompt.count("{c}") == 1 for prompt in prompts)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("VERSION", demo.VERSION + 1),
        ("IMAGE_SIDE", 96),
        ("OBJECT_SIDE", (0.3, 0.5)),
        ("MAX_ROTATION", 13),
        ("TRAIN_SHARDS", 3),
        ("TRAIN_SHARD_SIZE", 31),
        ("VAL_PER_CLASS", 3),
        ("VAL_SHARD", 3),
        ("PICTOGRAPHS", dict(reversed(demo.PICTOGRAPHS.items()))),
        ("COLORS", demo.COLORS | {"white": (255, 255, 255)}),
        ("TYPICAL_SHARE", 0.7),
        ("BACKGROUNDS", demo.BACKGROUNDS[:-1]),
        ("CAPTIONS", demo.CAPTIONS[::-1]),
        ("PROMPTS", demo.PROMPTS[:-1]),
        ("JPEG_QUALITY", 91),
    ],
)
def test_what_shapes_the_data_changes_the_folders_name(monkeypatch, name, value):
    before = demo._folder_name()
    assert demo._folder_name() == before and before.startswith(f"demo-{demo.VERSION}-")
    monkeypatch.setattr(demo, name, value)
    assert demo._folder_name() != before


def test_a_comment_in_the_code_does_not_change_the_folders_name(tmp_path):
    copy = tmp_path / "copied_demo.py"
    copy.write_text(Path(demo.__file__).read_text() + "# one more comment\n")
    spec = importlib.util.spec_from_file_location("copied_demo", copy)
    copied = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copied)
    for name in ("TRAIN_SHARDS", "TRAIN_SHARD_SIZE", "VAL_SHARD", "VAL_PER_CLASS"):
        setattr(copied, name, getattr(demo, name))
    assert copied._folder_name() == demo._folder_name()


def test_validation_has_as_many_scenes_of_each_class():
    data = demo.ensure_demo_data()
    names = (data.folder / "classnames.txt").read_text().splitlines()
    samples = read_samples(data.val[0])
    labels = [int(sample.read("cls")) for sample in samples]
    captions = [sample.read("txt").decode() for sample in samples]
    assert Counter(labels) == dict.fromkeys(range(NUM_CLASSES), 2)
    for label, caption, sample in zip(labels, captions, samples, strict=True):
        facts = json.loads(sample.read("json"))
        assert facts["class"] == names[label]
        assert f" {facts['color']} {names[label]} on " in caption


def test_a_training_scene_has_three_captions_that_name_its_object():
    for sample in read_samples(demo.ensure_demo_data().train[0]):
        captions = read_captions(sample)
        assert len(set(captions)) == 3
        assert captions[0] == sample.read("txt").decode()
        assert all(json.loads(sample.read("json"))["class"] in caption for caption in captions)


def test_four_of_five_scenes_have_one_of_two_colours_that_are_the_classes_own():
    pairs = {name: scenes.typical_colors(name) for name in scenes.CLASSES}
    assert len({frozenset(pair) for pair in pairs.values()}) == NUM_CLASSES
    assert all(first != second for first, second in pairs.values())
    rng = np.random.default_rng(0)
    drawn = Counter(scenes.draw_color(rng, "heart") for _ in range(4000))
    assert drawn.keys() == scenes.COLORS.keys()
    # 80 %, and two of the eight that the others are drawn from: 85 % in all, 0.6 % standard error.
    typical = sum(drawn[color] for color in pairs["heart"]) / 4000
    assert abs(typical - 0.85) < 0.02
    assert all(0.01 < drawn[c] / 4000 < 0.04 for c in drawn if c not in pairs["heart"])


def test_the_box_is_the_masks_and_the_object_has_its_size():
    for sample in read_samples(demo.ensure_demo_data().train[1]):
        image = Image.open(io.BytesIO(sample.read("jpg")))
        mask = np.asarray(Image.open(io.BytesIO(sample.read("mask.png"))))
        assert image.size == (80, 80) and mask.shape == (80, 80) and mask.dtype == bool
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        top, left, height, width = json.loads(sample.read("json"))["box"]
        assert (top, left) == (rows[0], columns[0])
        assert (top + height, left + width) == (rows[-1] + 1, columns[-1] + 1)
        # 30 to 42 % of 80 pixels; a faint edge may fall under the mask's threshold.
        assert 22 <= max(height, width) <= 34


def test_the_object_shows_its_colour_where_the_mask_is():
    scene = scenes.draw_scene(np.random.default_rng(0), "heart", "blue", "striped")
    pixels = np.asarray(scene.image)[np.asarray(scene.mask)]
    np.testing.assert_allclose(np.median(pixels, axis=0), (35, 80, 225), atol=3)


def test_the_font_has_every_pictograph(monkeypatch):
    monkeypatch.setitem(scenes.PICTOGRAPHS, "missing", "\U0010fffd")
    missing = scenes._render_glyph.__wrapped__("missing")
    glyphs = {scenes._render_glyph(name).tobytes() for name in scenes.CLASSES}
    assert len(glyphs) == NUM_CLASSES and missing.tobytes() not in glyphs


def test_articles_fit_the_words():
    made = [
        scenes.make_caption(template, "umbrella", "orange", "striped")
        for template in scenes.CAPTIONS
    ]
    assert made == [
        "a photo of an orange umbrella on a striped background",
        "a photo of an umbrella",
        "a picture of an umbrella",
        "a picture of an orange umbrella",
        "an umbrella",
    ]


def test_the_data_are_the_same_each_time_they_are_made(tmp_path, monkeypatch):
    first = demo.ensure_demo_data()
    monkeypatch.setenv("ACLIP_CACHE", str(tmp_path / "other"))
    second = demo.ensure_demo_data()
    assert first.folder != second.folder
    for path in first.folder.iterdir():
        assert path.read_bytes() == (second.folder / path.name).read_bytes()


def test_train_and_validation_share_no_scene():
    data = demo.ensure_demo_data()
    images = [s.read("jpg") for url in [*data.train, *data.val] for s in read_samples(url)]
    assert len(set(images)) == len(images) == 2 * 30 + 48


def test_the_data_are_written_once_also_when_several_ask_at_once(capsys):
    askers = [threading.Thread(target=demo.ensure_demo_data) for _ in range(3)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()
    demo.ensure_demo_data()
    assert capsys.readouterr().out.count("writing the demo data") == 1


def test_what_a_killed_writer_left_is_replaced():
    folder = demo.ensure_demo_data().folder
    unfinished = folder.with_suffix(".tmp")
    folder.rename(unfinished)
    (unfinished / "half.tar").touch()
    assert not (demo.ensure_demo_data().folder / "half.tar").exists()
    assert not unfinished.exists()


def test_a_cache_that_can_not_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("ACLIP_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ConfigError, match="ACLIP_CACHE"):
        demo.ensure_demo_data()
