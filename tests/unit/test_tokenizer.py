"""Captions to tokens: cleaned, cut, the end token last."""

import torch

from aclip.config.sections import TextTowerConfig
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
