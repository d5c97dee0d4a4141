"""Captions become shorter in training: what is kept of one that is longer than text.tokens.

Sources: truncate is what CLIP does; block and random are CLIPA's (arXiv 2305.07017); frequency is
CLIPF's (arXiv 2412.16148).
"""

from collections.abc import Callable, Mapping

import numpy as np

from aclip.config.recipe import Recipe
from aclip.data.shards.listing import Shard
from aclip.data.tokenizer import Tokenizer, build_tokenizer
from aclip.data.word_counts import drop_probabilities, find_word_counts

UNKNOWN = 1.0
"""The probability of a word that was seen too rarely to be counted: CLIPF drops it first."""


class Reducer:
    """Keeps at most so many ids of a caption; the same generator gives the same ones.

    Args:
        rule: block, random or frequency.
        tokenizer: the text tower's; its context_length is what a caption may have at most.
        drops: for frequency, the probability of each word to go first.
    """

    def __init__(self, rule: str, tokenizer: Tokenizer, drops: Mapping[str, float] | None = None):
        self.rule = rule
        self.tokenizer = tokenizer
        self.drops = drops

    def reduce(self, caption: str, rng: np.random.Generator) -> list[int]:
        """What is kept of a caption: ids, without start and end. One that fits stays whole."""
        ids, most = self.tokenizer.ids(caption), self.tokenizer.context_length - 2
        if len(ids) <= most:
            return ids
        if self.rule == "block":
            first = rng.integers(len(ids) - most + 1)
            return ids[first : first + most]
        if self.rule == "random":
            return [ids[place] for place in sorted(rng.permutation(len(ids))[:most])]
        words = self.tokenizer.words(caption)
        kept = keep_words(words, most, self.drops, rng.random)
        return self.tokenizer.ids(" ".join(kept))[:most]


def keep_words(
    words: list[str],
    most: int,
    drops: Mapping[str, float],
    draw: Callable[[int], np.ndarray],
) -> list[str]:
    """The `most` words, in their order, with the highest noise less their probability to go.

    Args:
        drops: the probability of each word, see drop_probabilities; UNKNOWN for all others.
        draw: gives so many uniform numbers in [0, 1). Of equals the earlier word is kept.
    """
    scores = draw(len(words)) - [drops.get(word, UNKNOWN) for word in words]
    return [words[place] for place in sorted((-scores).argsort(kind="stable")[:most])]


def build_text(recipe: Recipe, shards: list[Shard]) -> tuple[Tokenizer, Reducer | None]:
    """The tokenizer of training, which cuts captions to the recipe's text.tokens, and what makes
    them shorter before that; None where they are only cut.

    Raises:
        ConfigError: the counts of words that the recipe needs are not there, or can't be read.
    """
    shortest = {"context_length": recipe.caption_tokens}
    tokenizer = build_tokenizer(recipe.model.text.model_copy(update=shortest))
    rule, drops = recipe.text.reduce, None
    if rule == "truncate":
        return tokenizer, None
    if rule == "frequency":
        drops = drop_probabilities(find_word_counts(recipe, shards), recipe.text.threshold)
    return tokenizer, Reducer(rule, tokenizer, drops)
