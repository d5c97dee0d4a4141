"""Captions -> tokens: CLIP's byte-pair encoding as open_clip ships it, with its cleaning."""

from functools import cached_property

import torch

from aclip.config.sections import TextTowerConfig
from aclip.method.tokens import END_ID, START_ID, VOCAB_SIZE, Tokens, clip_tokens

MAX_CHARACTERS = 8192
"""How much of a caption is read, more than any context holds: the time to encode one
endless word grows with the square of its length."""
MAX_WORDS, MAX_WORD = 2**16, 64
"""How many words a tokenizer remembers, and how many bytes the longest of them may have: at most
about 20 MB in each worker. Captions of the web have no end of new words."""


class Tokenizer:
    """Encodes captions; pickles without its tables, which a worker process loads again.

    Args:
        context_length: most tokens of a caption, start and end included.
    """

    vocab_size = VOCAB_SIZE

    def __init__(self, context_length: int):
        self.context_length = context_length

    def __reduce__(self):
        return Tokenizer, (self.context_length,)

    @cached_property
    def _simple(self):
        # Here, because open_clip takes seconds to import and some commands never tokenize.
        from open_clip import SimpleTokenizer

        tokenizer = SimpleTokenizer(context_length=self.context_length, clean="lower")
        tokenizer.cache = _WordCache(tokenizer.cache)
        return tokenizer

    def encode(self, captions: list[str]) -> Tokens:
        """Encodes cleaned captions (ftfy, HTML entities, white space, lower case).

        Returns:
            The captions' tokens, on the CPU. A caption longer than context_length is cut, and its
            last token is the end token. What lies behind MAX_CHARACTERS is not read.
        """
        if not captions:
            return clip_tokens(self._simple([""])[:0])
        return clip_tokens(self._simple([text.strip()[:MAX_CHARACTERS] for text in captions]))

    def words(self, caption: str) -> list[str]:
        """The words of a caption as its cleaning and CLIP's pattern split it: runs of letters,
        single digits, runs of other signs, and endings such as 's; in lower case."""
        return self._simple.pat.findall(self._simple.clean_fn(caption.strip()[:MAX_CHARACTERS]))

    def ids(self, caption: str) -> list[int]:
        """All ids of a caption, without start and end; what stands behind an end token that the
        text itself spells is left out, as no tower reads it."""
        ids = self._simple.encode(caption.strip()[:MAX_CHARACTERS])
        return ids[: ids.index(END_ID)] if END_ID in ids else ids

    def stack(self, captions: list[list[int]]) -> Tokens:
        """The tokens of captions given by their ids, as `encode` gives them.

        Args:
            captions: at least one; of each at most context_length - 2 ids, without start and end.
        """
        rows = torch.zeros(len(captions), self.context_length, dtype=torch.int64)
        for row, ids in zip(rows, captions, strict=True):
            row[: len(ids) + 2] = torch.tensor([START_ID, *ids, END_ID])
        return clip_tokens(rows)


class _WordCache(dict):
    """The encoded words that open_clip's tokenizer keeps, which would grow without end.

    When it is full it starts anew: common words are back at once, and finding one stays as cheap.

    Args:
        special: what the tokenizer begins with and must always find.
    """

    def __init__(self, special: dict[str, str]):
        super().__init__(special)
        self._special = special

    def __setitem__(self, word: str, encoded: str) -> None:
        if len(word) > MAX_WORD:
            return
        if len(self) >= MAX_WORDS:
            self.clear()
            self.update(self._special)
        super().__setitem__(word, encoded)


def build_tokenizer(config: TextTowerConfig) -> Tokenizer:
    """The tokenizer of a text tower, or a FolderTokenizer, whose `encode` gives the same; see
    models.text.build_text_tower."""
    if config.name:
        # Here, because that module reads MAX_CHARACTERS.
        from aclip.data.folder_tokenizer import FolderTokenizer

        return FolderTokenizer(config)
    return Tokenizer(config.context_length)
