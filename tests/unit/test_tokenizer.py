"""Captions to tokens: cleaned, cut, the end token last."""

import torch

from aclip.config.sections import TextTowerConfig
from aclip.data import tokenizer as tokenizer_module
from aclip.data.tokenizer import build_tokenizer
from aclip.method.tokens import Tokens


def test_captions_are_cleaned_of_html_and_case():
    encode = build_tokenizer(TextTowerConfig()).encode
    plain = encode(["cassa d'epoca & more"])
    assert torch.equal(encode(["Cassa d&amp;#39;epoca  &amp; MORE "]).ids, plain.ids)


def test_a_long_caption_is_cut_and_keeps_its_end_token():
    tokenizer = build_tokenizer(TextTowerConfig(context_length=8))
    tokens = tokenizer.encode(["one two three four five six seven eight", "one"])
    ids = tokens.ids
    assert tokenizer.vocab_size == 49408 and ids.shape == (2, 8)
    assert ids[0, 0] == 49406 and ids[0, -1] == 49407
    assert ids[1].tolist() == [49406, ids[0, 1], 49407, 0, 0, 0, 0, 0]
    assert tokens.lengths.tolist() == [8, 3] and tokens.ends.tolist() == [7, 2]


def test_no_captions_are_no_tokens():
    assert len(build_tokenizer(TextTowerConfig()).encode([])) == 0


def test_parts_of_captions_and_their_places_follow_the_rows():
    tokens = Tokens(
        torch.tensor([[1, 2, 3, 9], [1, 9, 0, 0], [1, 5, 9, 0]]), torch.tensor([4, 2, 3])
    )
    part = tokens[1:]
    assert part.ids.tolist() == [[1, 9, 0, 0], [1, 5, 9, 0]] and part.lengths.tolist() == [2, 3]
    assert part.located().real_ids.tolist() == [0, 1, 4, 5, 6]
    moved = part.map(lambda tensor: tensor + 1)
    assert moved.lengths.tolist() == [3, 4] and moved.real_ids.tolist() == [1, 2, 5, 6, 7]


def words(count: int) -> list[str]:
    """Words of letters that no caption holds, each another one."""
    return ["q" + "".join(chr(ord("a") + int(digit)) for digit in f"{n:05d}") for n in range(count)]


def test_remembered_words_are_bounded_and_change_no_ids(monkeypatch):
    monkeypatch.setattr(tokenizer_module, "MAX_WORDS", 50)
    captions = [" ".join(["a", word, "<start_of_text>", "x" * 100]) for word in words(200)]
    bounded, fresh = build_tokenizer(TextTowerConfig()), build_tokenizer(TextTowerConfig())
    sizes = set()
    for caption in captions:
        bounded.encode([caption])
        sizes.add(len(bounded._simple.cache))
    assert max(sizes) == 50
    assert all(len(word) <= 64 for word in bounded._simple.cache)
    for caption in (captions[0], captions[137], captions[-1]):
        fresh.__dict__.pop("_simple", None)
        assert torch.equal(bounded.encode([caption]).ids, fresh.encode([caption]).ids)


def test_a_common_word_is_encoded_once_between_two_clearings(monkeypatch):
    monkeypatch.setattr(tokenizer_module, "MAX_WORDS", 50)
    simple = build_tokenizer(TextTowerConfig())._simple
    seen, look = [], simple.cache.__class__.__setitem__
    monkeypatch.setattr(
        simple.cache.__class__,
        "__setitem__",
        lambda self, word, encoded: seen.append(word) or look(self, word, encoded),
    )
    for word in words(96):  # 48 fill what the two special tokens leave
        simple.encode(f"photograph {word}")
    assert seen.count("photograph") == 3
