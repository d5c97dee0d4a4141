"""data.captions: which of a sample's captions is trained on, in order or with probabilities."""

import json
import math
from collections import Counter

import numpy as np
import pytest
from recipe_refusal import refusal
from small_recipe import SMALL_RECIPE

from aclip.config.caption_keys import split_key
from aclip.config.continuing import MAY_CHANGE, NEVER_CHANGE, key_of, recipe_changes
from aclip.config.recipe_file import dump_recipe, load_recipe
from aclip.data.captions import captions_under, note_kinds, order_keys
from aclip.data.find_data import find_data
from aclip.data.lanes.order import Place
from aclip.data.samples import SampleMaker
from aclip.data.shards.listing import Shard, Skip
from aclip.data.shards.tar import TarShard
from aclip.errors import ConfigError
from aclip.reports.kept_patches import loose_sample, read_picture_set

SMALL = ["model.image.resolution=32", "teacher=null", "mask.policy=none", "views.student=1"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ACLIP_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def make_samples(write_tar, encode_image):
    """make_samples(overrides, epochs, **members) -> the sample of each epoch."""

    def make(overrides, epochs=1, source=0, **members):
        content = [("0.jpg", encode_image(40, 36))]
        content += [(f"0.{name.replace('_', '.')}", text) for name, text in members.items()]
        (raw,) = TarShard(write_tar("0.tar", content)).walk()
        maker = SampleMaker(
            load_recipe(SMALL_RECIPE, [*SMALL, *overrides]), [Shard("0.tar", 1, source)]
        )
        return [maker.make(0, Place(0, 0, epoch, 0), raw) for epoch in range(epochs)]

    return make


@pytest.mark.parametrize(
    ("key", "place"),
    [
        ("txt", ("txt", "")),
        ("Long.TXT", ("long.txt", "")),
        ("json", ("json", "")),
        ("syn.json", ("syn.json", "")),
        ("syn.json:syn_text", ("syn.json", "syn_text")),
        ("long_caption", ("json", "long_caption")),
        ("Name of it", ("json", "Name of it")),
        ("json:txt", ("json", "txt")),
    ],
)
def test_a_key_is_a_member_or_a_field_of_a_json(key, place):
    assert split_key(key) == place


@pytest.mark.parametrize("key", ["", " txt", "txt:a", "syn.json:", ":a", "long.txt:a"])
def test_what_is_no_key_is_refused(key):
    with pytest.raises(ValueError, match="is no key of captions; give a member such as txt"):
        split_key(key)


MEMBERS = {
    "txt": b"raw\nraw too",
    "long.txt": b" \n",
    "json": json.dumps(
        {"captions": ["c", "d"], "short": "s", "several": ["x", "", None, "y"], "blank": " "}
    ).encode(),
    "syn.json": b'{"syn_text": ["one", "two"]}',
    "list.json": b'["p", "q"]',
    "bad.json": b"{",
}


@pytest.mark.parametrize(
    ("keys", "found", "notes"),
    [
        (["txt"], ["raw", "raw too"], {"caption_from_txt"}),
        (["short", "txt"], ["s"], {"caption_from_short"}),
        (["json"], ["c", "d"], {"caption_from_json"}),
        (["list.json"], ["p", "q"], {"caption_from_list.json"}),
        (["syn.json:syn_text"], ["one", "two"], {"caption_from_syn.json:syn_text"}),
        (
            ["several"],
            ["x", "y"],
            {"caption_from_several", "blank_in_json", "no_text_in_json"},
        ),
        # no member, no field, a blank one, a json that is a list: the next key counts
        (["no.txt", "txt"], ["raw", "raw too"], {"caption_from_txt", "other_caption_key"}),
        (["none", "long.txt", "short"], ["s"], {"caption_from_short", "other_caption_key"}),
        (["list.json:p", "short"], ["s"], {"caption_from_short", "other_caption_key"}),
        (
            ["bad.json:a", "short"],
            ["s"],
            {"caption_from_short", "other_caption_key", "unreadable_json"},
        ),
        (["no.txt", "none"], Skip("no_caption"), None),
        (["bad.json"], Skip("no_caption"), None),
        (["long.txt"], Skip("empty_caption"), None),
        (["blank", "none"], Skip("empty_caption"), None),
    ],
)
def test_the_first_key_with_a_caption_counts_and_is_noted(keys, found, notes):
    captions = captions_under(keys, MEMBERS.get)
    assert captions == found
    if notes is not None:
        assert captions.notes == notes


def test_keys_are_drawn_by_their_probabilities_also_where_one_is_missing():
    keys = {"a": 0.5, "b": 0.3, "c": 0.2}
    rng, number = np.random.default_rng(1), 6000
    orders = Counter(tuple(order_keys(keys, rng)) for _ in range(number))
    # One after the other without replacement: P(b, a, c) = 0.3 * 0.5 / (1 - 0.3).
    for order in ("abc", "acb", "bac", "bca", "cab", "cba"):
        first, second = keys[order[0]], keys[order[1]]
        expected = first * second / (1 - first)
        sigma = math.sqrt(expected * (1 - expected) / number)
        assert abs(orders[tuple(order)] / number - expected) < 4 * sigma, order
    without_a = sum(n for order, n in orders.items() if order.index("b") < order.index("c"))
    assert without_a / number == pytest.approx(0.3 / 0.5, abs=4 * math.sqrt(0.24 / number))
    same = {key: keys[key] for key in "cab"}
    seeds = range(20)
    assert [order_keys(keys, np.random.default_rng(s)) for s in seeds] == [
        order_keys(same, np.random.default_rng(s)) for s in seeds
    ]


def test_a_run_counts_which_caption_was_drawn(make_samples):
    overrides = ["data.captions={long.txt: 0.6, short: 0.3, none: 0.1}"]
    json_ = b'{"short": ["s1", "s2"]}'
    samples = make_samples(overrides, 400, long_txt=b"l", txt=b"raw", json=json_)
    drawn = Counter(sample.caption for sample in samples)
    assert drawn.keys() == {"l", "s1", "s2"}  # a list under a key is drawn from
    # Of 0.9 that is there, 2 in 3.
    assert drawn["l"] / 400 == pytest.approx(2 / 3, abs=4 * math.sqrt(2 / 9 / 400))
    assert drawn["s1"] / (400 - drawn["l"]) == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(100))
    noted = Counter(kind for sample in samples for kind in sample.notes)
    assert noted["caption_from_long.txt"] == drawn["l"]
    assert noted["caption_from_short"] == drawn["s1"] + drawn["s2"]
    assert noted["other_caption_key"] / 400 == pytest.approx(0.1, abs=4 * 0.3 / 20)
    kinds = note_kinds(load_recipe(SMALL_RECIPE, overrides).caption_keys)
    assert noted.keys() <= set(kinds) and len(set(kinds)) == len(kinds)


def test_a_preference_draws_nothing_and_a_sample_with_none_is_skipped(make_samples):
    plain = make_samples([], 3, txt=b"a\nb\nc")
    preferred = make_samples(["data.captions=[none, txt]"], 3, txt=b"a\nb\nc")
    for one, other in zip(plain, preferred, strict=True):
        assert one.caption == other.caption and one.notes == set()
        assert other.notes == {"caption_from_txt", "other_caption_key"}
        np.testing.assert_array_equal(one.student_boxes, other.student_boxes)
        np.testing.assert_array_equal(one.augment_params, other.augment_params)
    (skip,) = make_samples(["data.captions=[long.txt, other]"], txt=b"a")
    assert skip == Skip("no_caption") and skip.found == ("jpg", "txt")


def test_a_source_may_have_keys_of_its_own(make_samples):
    sources = (
        "data.sources=[{shards: a, weight: 1, captions: [long.txt]}, {shards: b, weight: 1}]",
        "data.train=[]",
        "data.captions=[txt]",
    )
    members = {"txt": b"raw", "long_txt": b"long"}
    (first,), (second,) = (make_samples(sources, source=n, **members) for n in (0, 1))
    assert (first.caption, second.caption) == ("long", "raw")
    assert note_kinds(load_recipe(SMALL_RECIPE, sources).caption_keys)[-2:] == (
        "caption_from_long.txt",
        "caption_from_txt",
    )


def test_training_shards_need_the_members_of_the_keys(write_tar, encode_image):
    content = [("0.jpg", encode_image(20, 20)), ("0.long.txt", b"a dog")]
    train = f"data.train={write_tar('x.tar', content)}"
    (shard,), _ = find_data(load_recipe(SMALL_RECIPE, [train, "data.captions=[txt, long.txt]"]))
    assert shard.num_samples == 1
    with pytest.raises(ConfigError, match=r"beside KEY.txt or KEY.json"):
        find_data(load_recipe(SMALL_RECIPE, [train]))
    with pytest.raises(ConfigError, match=r"found were .*long\.txt.*beside KEY.syn.json"):
        find_data(load_recipe(SMALL_RECIPE, [train, "data.captions=[syn.json:a]"]))


def test_pictures_read_captions_as_evaluation_does(encode_image):
    sample = loose_sample("a", encode_image(40, 40), "a dog")
    recipe = load_recipe(SMALL_RECIPE, ["data.captions=[long.txt]", "text.reduce=random"])
    assert read_picture_set(recipe, [sample]).captions == ["a dog"]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.captions=[txt, txt]", "data.captions holds txt twice; give each key once"),
        ("data.captions=[json:a, a]", "data.captions holds a twice"),
        ("data.captions=['a b ']", "data.captions holds 'a b ', which is no key of captions"),
        ("data.captions={txt: 0.5, a: 0.4}", "data.captions has probabilities of 0.9 in sum"),
        ("data.captions={txt: 1, a: 0}", "data.captions.a is 0, but input should be greater"),
        ("data.captions=5", "data.captions is 5, but input should be a valid array"),
        ("data.captions={txt: x}", "data.captions.txt is 'x', but input should be a valid n"),
        (
            "data.sources=[{shards: a, weight: 1, captions: ['txt:a']}]",
            "data.sources.0.captions holds 'txt:a', which is no key",
        ),
    ],
)
def test_bad_keys_are_refused_in_a_sentence(override, words):
    assert words in refusal("data.train=[]", override)


def test_keys_survive_a_dump_and_a_change_of_them_is_seen(tmp_path):
    base = ("data.train=[]",)
    one = "data.sources=[{shards: /a, weight: 1, captions: [txt]}]"
    two = "data.sources=[{shards: /b, weight: 1, captions: {txt: 0.4, a: 0.6}}]"
    then, now = load_recipe(SMALL_RECIPE, [*base, one]), load_recipe(SMALL_RECIPE, [*base, two])
    path = tmp_path / "r.yaml"
    path.write_text(dump_recipe(now))
    assert load_recipe(str(path)) == now
    changes = recipe_changes(then, now)
    assert changes == [
        'data.sources.0.shards "/a" -> "/b"',
        'data.sources.0.captions ["txt"] -> {"txt": 0.4, "a": 0.6}',
    ]
    asked = [key_of(each) for each in changes if key_of(each) not in MAY_CHANGE | NEVER_CHANGE]
    assert asked == ["data.sources.captions"]
    (change,) = recipe_changes(
        load_recipe(SMALL_RECIPE), load_recipe(SMALL_RECIPE, ["data.captions=[txt]"])
    )
    assert key_of(change) == "data.captions" and key_of(change) not in MAY_CHANGE | NEVER_CHANGE
