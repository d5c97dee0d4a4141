"""Captions -> token ids: CLIP's byte-pair encoding as open_clip ships it, with its cleaning."""

from functools import cached_property

from torch import Tensor

from aclip.method.tokens import VOCAB_SIZE, caption_lengths

MAX_CHARACTERS = 8192
"""So much of a caption is read, which is more than any context holds: byte-pair encoding of one
endless word takes time by the square of its length."""


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

        return SimpleTokenizer(context_length=self.context_length, clean="lower")

    def encode(self, captions: list[str]) -> Tensor:
        """Encodes cleaned captions (ftfy, HTML entities, white space, lower case).

        Returns:
            (B, L) int64, L the longest caption's length; 0 after the end token. A caption longer
            than context_length is cut, and its last token is the end token. What lies behind
            MAX_CHARACTERS is not read.
        """
        if not captions:
            return self._simple([""])[:0, :0]
        tokens = self._simple([caption.strip()[:MAX_CHARACTERS] for caption in captions])
        return cut_padding(tokens)


def cut_padding(tokens: Tensor) -> Tensor:
    """Cuts (B, L) tokens after the last end token."""
    return tokens[:, : int(caption_lengths(tokens).max())]


def build_tokenizer(context_length: int) -> Tokenizer:
    return Tokenizer(context_length)
