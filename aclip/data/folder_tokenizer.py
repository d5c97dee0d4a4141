"""Captions -> tokens by the tokenizer in a folder of Hugging Face's."""

import math
import os

import torch

from aclip.config.sections import TextTowerConfig
from aclip.config.text_folder import FIELD, read_text_folder
from aclip.data.tokenizer import MAX_CHARACTERS
from aclip.errors import ConfigError
from aclip.method.tokens import COLUMNS, Tokens


class FolderTokenizer:
    """Encodes captions; pickles without its tables, which a worker process loads again.

    A caption ends with the tokenizer's end token, which is added where the tokenizer itself adds
    none (GPT-2's, Llama's), so that no caption is empty.

    Args:
        config: names the folder.

    Raises:
        ConfigError: the tokenizer can't be loaded, has no end token or other ids than its model.
    """

    def __init__(self, config: TextTowerConfig):
        self._config = config
        self.context_length = config.context_length
        folder = read_text_folder(config)
        self.vocab_size = folder.vocab_size
        # Workers are as many as there are cores for them; threads of their own would be too many.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        # Here, because transformers takes seconds to import.
        from transformers import AutoTokenizer

        problem = f"{FIELD} is {config.name}, whose tokenizer"
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(str(folder.path), local_files_only=True)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
            raise ConfigError(
                f"{problem} transformers can't load ({' '.join(str(error).split())[:300]}); give a "
                "folder that save_pretrained wrote"
            ) from None
        if len(self._tokenizer) > self.vocab_size:
            raise ConfigError(
                f"{problem} has {len(self._tokenizer)} ids, but its model {self.vocab_size}; give "
                "the tokenizer of that model"
            )
        ends = (self._tokenizer.sep_token_id, self._tokenizer.eos_token_id)
        ends = [end for end in ends if end is not None]
        if not ends:
            raise ConfigError(
                f"{problem} has neither an eos_token nor a sep_token to end captions with; name "
                "one in tokenizer_config.json"
            )
        self._end = None if self._tokenizer("a")["input_ids"][-1] in ends else ends[-1]

    def __reduce__(self):
        return FolderTokenizer, (self._config,)

    def encode(self, captions: list[str]) -> Tokens:
        """Encodes captions as the tokenizer cleans them.

        Returns:
            The captions' tokens, on the CPU. A caption longer than context_length is cut, and its
            last token is the end token. What lies behind MAX_CHARACTERS is not read.
        """
        rows = []
        if captions:
            rows = self._tokenizer(
                [text.strip()[:MAX_CHARACTERS] for text in captions],
                truncation=True,
                max_length=self.context_length - (self._end is not None),
                padding=False,
            )["input_ids"]
        if self._end is not None:
            rows = [[*row, self._end] for row in rows]
        longest = max((len(row) for row in rows), default=0)
        ids = torch.zeros(len(rows), math.ceil(longest / COLUMNS) * COLUMNS, dtype=torch.int64)
        for own, row in zip(ids, rows, strict=True):
            own[: len(row)] = torch.tensor(row)
        return Tokens(ids, torch.tensor([len(row) for row in rows], dtype=torch.int64))
