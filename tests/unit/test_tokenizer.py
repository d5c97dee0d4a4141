"""Captions to tokens: cleaned, cut, the end token last."""

import torch

from aclip.data.tokenizer import build_tokenizer


def test_captions_are_cleaned_of_html_and_case():
    encode = build_tokenizer(77).encode
    plain = encode(["cassa d'epoca & more"])
    assert torch.equal(encode(["Cassa d&amp;#39;epoca  &amp; MORE "]), plain)


def test_a_long_caption_is_cut_and_keeps_its_end_token():
    tokenizer = build_tokenizer(8)
    tokens = tokenizer.encode(["one two three four five six seven eight", "one"])
    assert tokenizer.vocab_size == 49408 and tokens.shape == (2, 8)
    assert tokens[0, 0] == 49406 and tokens[0, -1] == 49407
    assert tokens[1].tolist() == [49406, tokens[0, 1], 49407, 0, 0, 0, 0, 0]
