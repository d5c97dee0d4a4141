"""The demo data: whole, reproducible, balanced, and true about where the object is."""

import importlib.util
import io
import json
import re
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from aclip.config.recipe_file import load_recipe
from aclip.data import demo, scene_captions, scenes
from aclip.data.members import read_captions
from aclip.data.shards.listing import Shard, index_shards, read_shard
from aclip.data.tokenizer import Tokenizer
from aclip.errors import ConfigError

NUM_CLASSES = 24


@pytest.fixture(autouse=True)
def small(tmp_path, monkeypatch):
    """Two train shards of 30 scenes, 50 validation scenes; forked writers inherit it."""
    monkeypatch.setenv("ACLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(demo, "TRAIN_SHARDS", 2)
    monkeypatch.setattr(demo, "VAL_SHARD", 2)
    monkeypatch.setattr(demo, "TRAIN_SHARD_SIZE", 30)
    monkeypatch.setattr(demo, "VAL_SIZE", 50)


def read_samples(url: str) -> list:
    (shard,) = index_shards([url])
    return [sample for _, sample in read_shard(shard)]


def test_the_folder_holds_listed_shards_class_names_and_prompts():
    data = demo.ensure_demo_data()
    assert index_shards(data.train) == [Shard(url, 30) for url in data.train]
    assert index_shards(data.val) == [Shard(data.val[0], 50)]
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
        ("OTHER_SIDE", (0.2, 0.3)),
        ("OTHERS_SHARE", 0.3),
        ("MAX_ROTATION", 13),
        ("TRAIN_SHARDS", 3),
        ("TRAIN_SHARD_SIZE", 31),
        ("VAL_SIZE", 51),
        ("VAL_SHARD", 3),
        ("PICTOGRAPHS", dict(reversed(demo.PICTOGRAPHS.items()))),
        ("COLORS", demo.COLORS | {"white": (255, 255, 255)}),
        ("TYPICAL_SHARE", 0.7),
        ("BACKGROUNDS", demo.BACKGROUNDS[:-1]),
        ("VALIDATION_CAPTION", "{an_object}"),
        ("CAPTIONS", demo.CAPTIONS[::-1]),
        ("CAPTIONS_PER_SCENE", 2),
        ("FILLED_SHARE", 0.4),
        ("LEADS", demo.LEADS[1:]),
        ("TAILS", demo.TAILS[1:]),
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
    for name in ("TRAIN_SHARDS", "TRAIN_SHARD_SIZE", "VAL_SHARD", "VAL_SIZE"):
        setattr(copied, name, getattr(demo, name))
    assert copied._folder_name() == demo._folder_name()


def test_validation_has_as_many_scenes_of_each_class_or_one_more():
    data = demo.ensure_demo_data()
    names = (data.folder / "classnames.txt").read_text().splitlines()
    samples = read_samples(data.val[0])
    counts = Counter(int(sample.read("cls")) for sample in samples)
    assert counts == {0: 3, 1: 3} | dict.fromkeys(range(2, NUM_CLASSES), 2)  # 50 = 24 * 2 + 2
    for sample in samples:
        facts = json.loads(sample.read("json"))
        named, name = facts["objects"][0], names[int(sample.read("cls"))]
        assert named["class"] == name
        (caption,) = facts["captions"]
        assert caption == sample.read("txt").decode()
        assert f" {named['color']} {name} on " in caption and facts["background"] in caption


def test_a_training_scene_has_three_captions_that_name_its_object():
    for sample in read_samples(demo.ensure_demo_data().train[0]):
        captions = read_captions(sample)
        assert len(set(captions)) == 3
        assert captions[0] == sample.read("txt").decode()
        named = json.loads(sample.read("json"))["objects"][0]
        assert all(re.search(rf"\b{named['class']}\b", caption) for caption in captions)


def test_no_words_that_fill_a_caption_are_those_of_a_picture():
    """A class, colour or background among them would be a wrong caption."""
    for text in (*scene_captions.LEADS, *scene_captions.TAILS):
        for words in (*scenes.CLASSES, *scenes.COLORS, *scenes.BACKGROUNDS):
            assert not re.search(rf"\b{words}\b", text)


def test_half_of_the_captions_are_filled_and_few_name_colour_or_background():
    rng = np.random.default_rng(0)
    captions = [
        caption
        for _ in range(1000)
        for caption in scene_captions.draw_captions(rng, "heart", "blue", "wavy", 3)
    ]
    filled = [text for text in captions if any(
        words in text for words in (*scene_captions.LEADS, *scene_captions.TAILS)
    )]  # fmt: skip
    # Shares of 3,000 draws: standard errors of 0.9 points at most.
    assert abs(len(filled) / 3000 - 0.5) < 0.04
    assert abs(sum("blue" in text for text in captions) / 3000 - 0.4) < 0.04
    assert abs(sum("wavy" in text for text in captions) / 3000 - 0.1) < 0.03


def test_the_longest_caption_fits_the_context_of_the_demos_text_tower():
    recipe = load_recipe("demo")
    longest = (
        f"{max(scene_captions.LEADS, key=len)} a photo of a turquoise music note on a "
        f"checkered background{max(scene_captions.TAILS, key=len)}"
    )
    ids = Tokenizer(1000).ids(longest)
    assert len(ids) + 2 <= recipe.model.text.context_length


def test_four_of_five_scenes_have_one_of_two_colours_that_are_the_classes_own():
    pairs = {name: scenes.typical_colors(name) for name in scenes.CLASSES}
    assert len({frozenset(pair) for pair in pairs.values()}) == NUM_CLASSES
    assert all(first != second for first, second in pairs.values())
    rng = np.random.default_rng(0)
    drawn = Counter(scenes.draw_color(rng, "heart") for _ in range(4000))
    assert drawn.keys() == scenes.COLORS.keys()
    # 80 %, and two of the twelve that the others are drawn from: 83.3 %, standard error 0.6 %.
    typical = sum(drawn[color] for color in pairs["heart"]) / 4000
    assert abs(typical - 0.8333) < 0.02
    assert all(0.008 < drawn[c] / 4000 < 0.027 for c in drawn if c not in pairs["heart"])


def test_boxes_are_the_masks_and_the_named_object_has_its_size():
    several = 0
    for sample in read_samples(demo.ensure_demo_data().train[1]):
        image = Image.open(io.BytesIO(sample.read("jpg")))
        mask = np.asarray(Image.open(io.BytesIO(sample.read("mask.png"))))
        assert image.size == (80, 80) and mask.shape == (80, 80) and mask.dtype == bool
        objects = json.loads(sample.read("json"))["objects"]
        instances = mask.astype(np.uint8)
        if len(objects) > 1:
            several += 1
            instances = np.asarray(Image.open(io.BytesIO(sample.read("instances.png"))))
            np.testing.assert_array_equal(instances == 1, mask)
        assert set(np.unique(instances)) == {*range(len(objects) + 1)}
        assert len({each["class"] for each in objects}) == len(objects)
        for number, each in enumerate(objects, 1):
            own = instances == number
            rows, columns = np.flatnonzero(own.any(1)), np.flatnonzero(own.any(0))
            top, left, height, width = each["box"]
            assert (top, left) == (rows[0], columns[0])
            assert (top + height, left + width) == (rows[-1] + 1, columns[-1] + 1)
            # 30 to 42 % of 80 pixels, or 18 to 26; a faint edge may be no part of the mask.
            least, most = (22, 34) if number == 1 else (11, 22)
            assert least <= max(height, width) <= most
    assert 1 <= several <= 15  # a fifth of 30


def test_a_fifth_of_the_scenes_have_other_objects():
    rng = np.random.default_rng(0)
    drawn = [len(scenes.draw_scene(rng, "heart", "blue", "wavy").objects) for _ in range(500)]
    assert abs(np.mean([number > 1 for number in drawn]) - 0.2) < 0.06  # 1.8 % standard error
    assert set(drawn) == {1, 2, 3}


def test_the_object_shows_its_colour_where_the_mask_is():
    scene = scenes.draw_scene(np.random.default_rng(0), "cloud", "blue", "striped")
    pixels = np.asarray(scene.image)[np.asarray(scene.objects[0].mask)]
    np.testing.assert_allclose(np.median(pixels, axis=0), (35, 80, 225), atol=3)


def test_the_font_has_every_pictograph_and_no_two_classes_share_one():
    missing = scenes._render_glyph.__wrapped__("\U0010fffd").tobytes()
    looks = "".join(scenes.PICTOGRAPHS.values())
    glyphs = {scenes._render_glyph(look).tobytes() for look in looks}
    assert len(glyphs) == len(looks) and missing not in glyphs
    assert len(scenes.CLASSES) == NUM_CLASSES


def test_articles_fit_the_words():
    templates = ("{an_object}", "{a_color_object}", "{a_color_object} on {a_background} background")
    made = [
        scene_captions.make_caption(template, *content)
        for template in templates
        for content in (("umbrella", "orange", "striped"), ("dice", "black", "wavy"))
    ]
    assert made == [
        "an umbrella",
        "a dice",
        "an orange umbrella",
        "a black dice",
        "an orange umbrella on a striped background",
        "a black dice on a wavy background",
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
    assert len(set(images)) == len(images) == 2 * 30 + 50


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
