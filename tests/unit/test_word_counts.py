"""Counts of words: what is counted, the probabilities by hand, the command, and what is refused."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
from small_recipe import SMALL_RECIPE

from aclip.config.recipe_file import load_recipe
from aclip.data.convert import word_counts as command
from aclip.data.fingerprint import check_continues, fingerprint
from aclip.data.reduce import build_text
from aclip.data.shards.listing import Shard
from aclip.data.word_counts import count_words, drop_probabilities, find_word_counts
from aclip.errors import ConfigError

SCRIPT = Path(__file__).parents[2] / "launch" / "convert.py"
# Ten sentences: a 10, dog 8, red 5, ! 5; & 3, friends 3 and cat 2 come less than five times.
CORPUS = ["A red dog!"] * 5 + ["a  dog &amp; friends"] * 3 + ["A cat"] * 2
COUNTS = {"a": 10, "dog": 8, "!": 5, "red": 5}
FREQUENCY = ["text.reduce=frequency", "text.tokens=8"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ACLIP_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def corpus(write_tar) -> list[str]:
    """The ten sentences in three shards, one of which holds two as the lines of one text."""

    def members(texts):
        return [(f"{n}.{s}", t) for n, text in enumerate(texts) for s, t in _pair(text)]

    def _pair(text):
        return ("jpg", b"never read"), ("txt", text.encode())

    return [
        write_tar("0.tar", members(CORPUS[:4])),
        write_tar("1.tar", members(["\n".join(CORPUS[4:6]), *CORPUS[6:]])),
        write_tar("2.tar", [("0.jpg", b"x"), ("1.jpg", b"x"), ("1.long.txt", b"long words")]),
    ]


@pytest.fixture
def convert(monkeypatch):
    spec = importlib.util.spec_from_file_location("launch_convert", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["convert.py", "word-counts", *map(str, arguments)])
        script.main()

    return run


def test_the_command_counts_the_words_of_all_shards(corpus, convert, tmp_path, capsys):
    convert(f"{tmp_path}/*.tar", "--processes", "2")
    path = tmp_path / "word_counts.json"
    content = json.loads(path.read_text())
    assert content == {"captions": 10, "least": 5, "words": COUNTS}
    assert list(content["words"]) == ["a", "dog", "!", "red"]  # frequent first, then by name
    output = capsys.readouterr().out
    assert "36 words in 10 captions of 11 samples; wrote the 4 different ones" in output
    assert f"{path}\n2 samples have no caption" in output
    recipe = load_recipe(SMALL_RECIPE, [*FREQUENCY, f"data.train={tmp_path}/*.tar"])
    assert find_word_counts(recipe, [Shard(url, 1) for url in corpus]) == COUNTS
    with pytest.raises(ConfigError, match="--output is .*word_counts.json, which exists"):
        convert(*corpus)


def test_probabilities_are_those_of_a_calculation_by_hand():
    # f = 10/28, 8/28, 5/28: 28 words come five times. With t = 0.1, t / f = 0.28, 0.35, 0.56.
    expected = {"a": 0.4708497, "dog": 0.4083920, "!": 0.2516685, "red": 0.2516685}
    with_rare = COUNTS | {"&": 3, "friends": 3, "cat": 2}
    assert drop_probabilities(with_rare, 0.1) == pytest.approx(expected, abs=1e-7)
    # t is above the share 5/28 = 0.179 of two words, which never go first: no root of more than 1.
    assert drop_probabilities(COUNTS, 0.2)["red"] == 0
    assert drop_probabilities(COUNTS, 0.2)["a"] == pytest.approx(1 - math.sqrt(0.56))
    assert drop_probabilities({"a": 10**6}, 1e-6) == {"a": pytest.approx(0.999)}
    assert drop_probabilities({"rare": 4}, 1e-6) == {}


def test_words_are_lower_case_without_markup_and_signs_stand_alone(write_tar):
    text = b"The dog's 2 dogs&#33;  ISN'T it?\nthe"
    found = count_words(write_tar("0.tar", [("0.txt", text)]))
    assert found.words == dict.fromkeys(["dog", "'s", "2", "dogs", "!", "isn", "'t", "it"], 1) | {
        "the": 2,
        "?": 1,
    }
    assert (found.samples, found.captions) == (1, 2)


def test_captions_under_several_keys_are_all_counted(write_tar, convert, tmp_path):
    members = [("0.txt", b"raw"), ("0.long.txt", b"l l"), ("0.json", b'{"short": ["s", "s t"]}')]
    url = write_tar("0.tar", members)
    found = count_words(url, ["short", "long.txt", "none"])
    assert found.words == {"s": 2, "t": 1, "l": 2} and found.captions == 3
    for number in range(1, 5):
        write_tar(f"{number}.tar", members)
    out = tmp_path / "here" / "counts.json"
    convert(f"{tmp_path}/*.tar", "--captions", "long.txt", "--captions", "short", "--output", out)
    assert json.loads(out.read_text())["words"] == {"l": 10, "s": 10, "t": 5}


def test_a_damaged_shard_is_counted_as_far_as_it_goes_and_named(write_tar, convert, capsys):
    whole = write_tar("0.tar", [(f"{n}.txt", b"dog") for n in range(6)])
    cut = write_tar("1.tar", [(f"{n}.txt", b"cat " * 300) for n in range(3)])
    with open(cut, "r+b") as file:
        file.truncate(512 + 1536 + 512 + 100)  # in the second sample's text
    convert(whole, cut)
    output = capsys.readouterr().out
    assert "306 words in 7 captions of 7 samples" in output
    assert f"1 shards are truncated or corrupt: {cut}" in output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["/nowhere/*.tar"], "SHARDS is /nowhere/"),
        (["{tmp}/rare.tar"], "1 samples hold 1 captions and no word that comes 5 times; give"),
        (["{tmp}/rare.tar", "--captions", "txt:a"], "--captions is 'txt:a', which is no key"),
        (["{tmp}/rare.tar", "--processes", "0"], "--processes is 0"),
        (["{tmp}/bad.tar"], "bad.tar"),
        (["{tmp}/rare.tar", "{tmp}/b/rare.tar"], "--output is not given, and the shards lie in"),
        (["pipe:cat {tmp}/rare.tar"], "--output is not given"),
    ],
)
def test_bad_arguments_are_one_sentence_and_nothing_is_written(
    write_tar, convert, tmp_path, arguments, words
):
    (tmp_path / "b").mkdir()
    for name in ("rare.tar", "b/rare.tar"):
        write_tar(name, [("0.txt", b"dog")])
    (tmp_path / "bad.tar").write_bytes(b"\x1f\x8bgzip")
    with pytest.raises(ConfigError) as error:
        convert(*(argument.format(tmp=tmp_path) for argument in arguments))
    assert words in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"words": {}}', '{"words": {"a": "1"}}'])
def test_a_file_without_counts_is_refused(tmp_path, content):
    path = tmp_path / "c.json"
    recipe = load_recipe(SMALL_RECIPE, [*FREQUENCY, "data.train=/x", f"text.word_counts={path}"])
    with pytest.raises(ConfigError, match="text.word_counts is .*, but there is no such file"):
        build_text(recipe, [])
    path.write_text(content)
    with pytest.raises(ConfigError, match="c.json holds no counts of words; make it anew with"):
        build_text(recipe, [])


def test_counts_beside_the_shards_of_several_folders_are_added_up(tmp_path):
    shards = [Shard(f"{tmp_path}/{folder}/{n}.tar", 1) for folder in "ab" for n in range(2)]
    recipe = load_recipe(SMALL_RECIPE, [*FREQUENCY, "data.train=/x"])
    for folder in "ab":
        words = rf"no word_counts.json in .*/{folder}; make it with .* word-counts SHARDS, and"
        with pytest.raises(ConfigError, match=words):
            find_word_counts(recipe, shards)
        (tmp_path / folder).mkdir()
        content = json.dumps({"words": {"x": 5, folder: 7}})
        (tmp_path / folder / "word_counts.json").write_text(content)
    assert find_word_counts(recipe, shards) == {"x": 10, "a": 7, "b": 7}
    with pytest.raises(ConfigError, match="no word_counts.json beside a command"):
        find_word_counts(recipe, [Shard("pipe:cat x", 1)])


def test_the_demos_words_are_counted_on_first_use(corpus, monkeypatch, tmp_path):
    recipe = load_recipe(SMALL_RECIPE, FREQUENCY)
    shards = [Shard(url, 1) for url in corpus]
    assert find_word_counts(recipe, shards) == COUNTS
    monkeypatch.setattr("aclip.data.word_counts.count_words", None)  # not again
    assert find_word_counts(recipe, shards) == COUNTS
    _, reducer = build_text(recipe, shards)
    assert reducer.drops["dog"] == pytest.approx(1 - math.sqrt(1e-6 * 28 / 8))


def test_the_command_takes_the_demo_for_its_shards(corpus, monkeypatch, tmp_path):
    class Demo:
        train = corpus

    monkeypatch.setattr(command, "ensure_demo_data", Demo)
    command.write_word_counts(["demo"], None, [], 1)
    assert json.loads((tmp_path / "word_counts.json").read_text())["words"] == COUNTS


def test_other_counts_are_no_continuation(tmp_path):
    shards = [Shard(f"{tmp_path}/0.tar", 1)]
    recipe = load_recipe(SMALL_RECIPE, [*FREQUENCY, "data.train=/x"])
    path = tmp_path / "word_counts.json"
    path.write_text('{"words": {"x": 5}}')
    then = json.loads(json.dumps(fingerprint(recipe, shards)))
    check_continues(recipe, shards, then, tmp_path)
    moved = path.rename(tmp_path / "moved.json")
    named = load_recipe(SMALL_RECIPE, [*FREQUENCY, "data.train=/x", f"text.word_counts={moved}"])
    check_continues(named, shards, then, tmp_path)
    moved.write_text('{"words": {"x": 6}}')
    with pytest.raises(ConfigError, match="the counts of words .* are not those that .* put that"):
        check_continues(named, shards, then, tmp_path)
    # Another rule is another setting, which is asked for elsewhere.
    check_continues(load_recipe(SMALL_RECIPE, ["data.train=/x"]), shards, then, tmp_path)
