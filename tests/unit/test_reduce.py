"""text.reduce: each rule against a slow one, and the stream of what it leaves."""

import math
from collections import Counter
from functools import cache
from itertools import combinations
from statistics import NormalDist

import numpy as np
import pytest
import torch
from open_clip import SimpleTokenizer
from recipe_refusal import refusal
from shard_batches import assert_equal_batches, make_recipe, take
from small_recipe import SMALL_RECIPE

from aclip.config.recipe_file import load_recipe, recipe_names
from aclip.data.batch import collate
from aclip.data.lanes.order import Place
from aclip.data.reduce import Reducer, build_text, keep_words
from aclip.data.samples import SampleMaker
from aclip.data.shards.listing import Shard
from aclip.data.shards.tar import TarShard
from aclip.data.synthetic import mean_in_training, synthetic_batch
from aclip.data.tokenizer import Tokenizer

CLIP = SimpleTokenizer()
tokenizer_of = cache(Tokenizer)  # whose tables take a while to load
START, END = 49406, 49407
RULES = ("block", "random", "frequency")
DROPS = {"a": 0.99, "dog": 0.7, "on": 0.97, "photosynthesis": 0.0}
LONG = "a dog and a bicycle on photosynthesis street, isn't it? a dog"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ACLIP_CACHE", str(tmp_path / "cache"))


def slow_words(caption: str) -> list[str]:
    """Runs of letters, of other signs, single digits and endings, character by character."""
    words, text = [], " ".join(caption.lower().split())
    while text:
        ending = next(
            (e for e in ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d") if text[:3].startswith(e)), ""
        )
        length = len(ending) or 1
        kind = text[0].isalpha()
        if not ending and not text[0].isdigit() and text[0] != " ":
            while length < len(text) and not (
                text[length] == " " or text[length].isdigit() or text[length].isalpha() != kind
            ):
                length += 1
        words += [text[:length]] if text[0] != " " else []
        text = text[length:]
    return words


def slow(rule: str, caption: str, budget: int, seed: int) -> list[int]:
    """The rule, as the notes on the papers say it, with the draws of that seed."""
    rng, room = np.random.default_rng(seed), budget - 2
    tokens = CLIP.encode(caption)
    if len(tokens) <= room:
        return tokens
    if rule == "block":
        start = int(rng.integers(0, len(tokens) - room, endpoint=True))
        return [tokens[start + n] for n in range(room)]
    if rule == "random":
        chosen = {int(n) for n in rng.permutation(len(tokens))[:room]}
        return [token for place, token in enumerate(tokens) if place in chosen]
    words = slow_words(caption)
    u = rng.random(len(words))
    scored = [(u[n] - DROPS.get(word, 1.0), n) for n, word in enumerate(words)]
    best = sorted(scored, key=lambda pair: (-pair[0], pair[1]))[: min(room, len(words))]
    kept = " ".join(words[n] for n in sorted(n for _, n in best))
    return CLIP.encode(kept)[:room]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "caption",
    [
        "",
        "dog",
        "a dog",
        "photosynthesis",
        "antidisestablishmentarianism",  # one word of more tokens than a budget of 4
        "a a a a a a a a",
        "a photo of 2014 dogs !!! & a caf\xe9",
        "\u732b \u72ac on a mat",
        LONG,
    ],
)
def test_each_rule_is_the_slow_one_for_every_budget(rule, caption):
    for budget in (3, 4, 5, 8, 13):
        reducer = Reducer(rule, tokenizer_of(budget), DROPS)
        for seed in range(4):
            found = reducer.reduce(caption, np.random.default_rng(seed))
            assert found == slow(rule, caption, budget, seed), (budget, seed)


@pytest.mark.parametrize("rule", RULES)
def test_a_caption_that_fits_exactly_is_left_alone_and_one_token_more_is_not(rule):
    caption = "dog cat car tree house bird"  # six tokens
    ids = CLIP.encode(caption)
    assert len(ids) == 6
    for seed in range(10):
        assert (
            Reducer(rule, tokenizer_of(8), DROPS).reduce(caption, np.random.default_rng(seed))
            == ids
        )
        fewer = Reducer(rule, tokenizer_of(7), DROPS).reduce(caption, np.random.default_rng(seed))
        assert len(fewer) == 5 and set(fewer) < set(ids)


def test_every_window_and_every_choice_of_tokens_is_equally_likely():
    caption, number = "dog cat car tree house", 3000
    ids = CLIP.encode(caption)
    counts = {
        rule: Counter(
            tuple(Reducer(rule, tokenizer_of(5)).reduce(caption, np.random.default_rng(seed)))
            for seed in range(number)
        )
        for rule in ("block", "random")
    }
    windows = {tuple(ids[start : start + 3]) for start in range(3)}
    choices = set(combinations(ids, 3))
    for rule, expected in (("block", windows), ("random", choices)):
        assert counts[rule].keys() == expected
        share = 1 / len(expected)
        sigma = math.sqrt(number * share * (1 - share))
        assert all(abs(count - number * share) < 4 * sigma for count in counts[rule].values())


def test_words_with_the_highest_noise_less_their_probability_stay_in_order():
    words, drops = ["a", "cat", "on", "a", "mat", "zzz"], {"a": 0.9, "cat": 0.25, "on": 0.5}
    # scores -0.15, 0.25, 0, -0.4, and 0.75 - 1 and 0.875 - 1 for words without a probability
    noise = np.array([0.75, 0.5, 0.5, 0.5, 0.75, 0.875])

    def keep(most):
        return keep_words(words, most, drops, lambda count: noise[:count])

    assert keep(1) == ["cat"]
    assert keep(2) == ["cat", "on"]
    assert keep(3) == ["cat", "on", "zzz"]
    assert keep(4) == ["a", "cat", "on", "zzz"]
    assert keep(9) == words
    # Of equals the first stays.
    assert keep_words(list("xyxy"), 2, {}, np.zeros) == ["x", "y"]
    assert keep_words([], 2, {}, np.zeros) == []


def test_an_end_token_that_the_text_spells_ends_the_caption():
    tokenizer = tokenizer_of(5)
    assert tokenizer.ids("a dog <end_of_text> more") == CLIP.encode("a dog")


def test_stacked_ids_are_what_encoding_gives():
    tokenizer = tokenizer_of(13)
    captions = ["", "dog", "a dog on a mat", "one two three four five six seven eight nine ten"]
    rows = [CLIP.encode(caption) for caption in captions]
    stacked, encoded = tokenizer.stack(rows), tokenizer.encode(captions)
    assert stacked.ids.tolist() == encoded.ids.tolist()
    assert stacked.lengths.tolist() == encoded.lengths.tolist() == [2, 3, 7, 12]
    assert stacked.ids[1].tolist() == [START, *rows[1], END, *[0] * 10]


@pytest.fixture
def make_samples(write_tar, encode_image):
    def make(overrides, epochs=1):
        content = [("0.jpg", encode_image(40, 36)), ("0.txt", LONG.encode())]
        (raw,) = TarShard(write_tar("0.tar", content)).walk()
        recipe = load_recipe(SMALL_RECIPE, ["model.image.resolution=32", "loss.mlm=1", *overrides])
        shards = [Shard("0.tar", 1)]
        tokenizer, reducer = build_text(recipe, shards)
        maker = SampleMaker(recipe, shards, reducer=reducer)
        samples = [maker.make(0, Place(0, 0, epoch, 0), raw) for epoch in range(epochs)]
        return samples, collate(samples, tokenizer, np.zeros((1, 3), dtype=np.int64), {})

    return make


def test_a_reduction_changes_no_other_draw_and_is_drawn_anew_each_epoch(make_samples):
    plain, batch = make_samples([], 6)
    assert all(sample.token_ids is None for sample in plain)
    assert batch.tokens.lengths.tolist() == [len(CLIP.encode(LONG)) + 2] * 6
    for overrides in (
        ["text.reduce=random", "text.tokens=8"],
        ["text.reduce=block", "text.tokens=6"],
    ):
        reduced, batch = make_samples(overrides, 6)
        budget = int(overrides[1][-1])
        assert batch.tokens.lengths.tolist() == [budget] * 6 and batch.captions == [LONG] * 6
        assert len({str(sample.token_ids) for sample in reduced}) > 2
        for one, other in zip(plain, reduced, strict=True):
            np.testing.assert_array_equal(one.student_boxes, other.student_boxes)
            np.testing.assert_array_equal(one.augment_params, other.augment_params)
            np.testing.assert_array_equal(one.term_noise["mlm"], other.term_noise["mlm"])


def test_truncation_keeps_the_beginning_and_needs_no_draw(make_samples):
    (sample,), batch = make_samples(["text.tokens=8"])
    assert sample.token_ids is None
    assert batch.tokens.ids.tolist() == [[START, *CLIP.encode(LONG)[:6], END]]
    (_,), whole = make_samples(["text.tokens=32"])
    assert torch.equal(whole.tokens.ids, make_samples([])[1].tokens.ids)


STREAM = {
    "text": {"reduce": "frequency", "tokens": 8},
    "data": {"captions": {"txt": 0.4, "long.txt": 0.6}},
    "mask": {"policy": "attentive", "warmup": 0.5},
}


@pytest.fixture
def shards(write_tar, encode_image, tmp_path):
    words = [f"{first}{last}" for first in ("sun", "blue", "rain") for last in ("day", "bird", "s")]
    rng, shards = np.random.default_rng(0), []
    for shard in range(4):
        content = []
        for index in range(7):
            name = f"{shard}-{index}"
            content.append((f"{name}.jpg", encode_image(34, 36, 7 * shard + index)))
            for suffix, length in (("txt", 9), ("long.txt", 14)):
                text = " ".join(rng.choice(words, length))
                content.append((f"{name}.{suffix}", text.encode()))
        shards.append(Shard(write_tar(f"{shard}.tar", content), 7))
    (tmp_path / "word_counts.json").write_text('{"words": {"sunday": 50, "bluebird": 5}}')
    return shards


@pytest.mark.parametrize("rule", ["block", "frequency"])
@pytest.mark.parametrize(("ranks", "workers"), [(2, 1), (4, 0)])
def test_the_stream_is_the_same_for_any_ranks_and_workers_and_goes_on(shards, rule, ranks, workers):
    sections = STREAM | {"text": {"reduce": rule, "tokens": 8}}
    expected = take(make_recipe(0, **sections), shards, 1, 4)
    assert all(batch.tokens.lengths.tolist() == [8] * 16 for batch in expected)
    assert sum((Counter(batch.noted) for batch in expected), Counter()).total() == 4 * 16
    found = take(make_recipe(workers, **sections), shards, ranks, 4)
    found_on = take(make_recipe(workers, **sections), shards, ranks, 2, expected[1].cursors)
    for first, second in zip([*expected, *expected[2:]], [*found, *found_on], strict=True):
        assert_equal_batches(first, second)
        assert torch.equal(first.mask_noise, second.mask_noise)
        assert first.noted == second.noted
    truncated = take(make_recipe(0, **STREAM | {"text": {"tokens": 8}}), shards, 1, 4)
    for first, second in zip(expected, truncated, strict=True):
        assert first.captions == second.captions and torch.equal(
            first.mask_noise, second.mask_noise
        )
        assert not torch.equal(first.tokens.ids, second.tokens.ids)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["text.tokens=33"],
            "text.tokens is 33, but the text tower reads 32; give at most as many",
        ),
        (["text.tokens=2"], "text.tokens is 2, but input should be greater than or equal to 3"),
        (["text.reduce=syntax"], "text.reduce is 'syntax', but input should be 'truncate', "),
        (["text.word_counts=x.json"], "text.word_counts is x.json, but text.reduce truncate"),
        (["text.reduce=block", "text.threshold=1e-7"], "text.threshold is 1e-07, but text.reduce"),
        (["text.reduce=frequency", "text.threshold=0"], "text.threshold is 0, but input should be"),
    ],
)
def test_bad_keys_are_refused_in_a_sentence(overrides, words):
    assert words in refusal(*overrides)


@pytest.mark.parametrize("name", recipe_names())
def test_any_recipe_takes_shorter_captions_and_counts_them(name):
    recipe = load_recipe(name, ["text.reduce=frequency", "text.tokens=8"])
    assert recipe.caption_tokens == 8


def test_the_mean_of_shorter_captions_is_that_of_their_lengths_cut():
    recipe = load_recipe("clip_vitb16", ["text.tokens=8"])
    # Captions of 12 tokens in the middle and 20 on average, log-normal, cut to what is read.
    spread = NormalDist(math.log(12), math.sqrt(2 * math.log(20 / 12)))
    lengths = [math.exp(spread.inv_cdf((n + 0.5) / 5000)) for n in range(5000)]
    read = [min(max(round(length), 3), 77) for length in lengths]
    mean = sum(read) / len(read)
    for given in (mean, 22, 10):
        expected = sum(min(max(length * given / mean, 2), 8) for length in read) / len(read)
        assert mean_in_training(recipe, given) == pytest.approx(expected, rel=2e-3)
    whole = load_recipe("clip_vitb16")
    assert mean_in_training(whole, 22) == 22 and mean_in_training(whole, 100) == 77


def test_a_measured_step_reads_the_shorter_captions():
    from aclip.planning.measure_step import measure_run

    def text_flops(*overrides):
        recipe = load_recipe(SMALL_RECIPE, ["train.global_batch_size=16", *overrides])
        batch = synthetic_batch(recipe, 16)
        measured = measure_run(recipe, batch, modes=("none",))
        return batch.tokens.lengths, measured.flops["text"].forward

    lengths, flops = text_flops()
    shorter, fewer = text_flops("text.reduce=block", "text.tokens=8")
    assert shorter.tolist() == [min(length, 8) for length in lengths.tolist()]
    # A token's products with weights: 12 * 96^2 in the first layer, and of the last one, which is
    # computed for the end token alone, those of key and value. Attention adds little.
    of_weights = 2 * (12 + 2) * 96**2
    saved = (sum(lengths) - sum(shorter)).item() / 16 * of_weights
    assert saved <= flops - fewer <= 1.15 * saved
