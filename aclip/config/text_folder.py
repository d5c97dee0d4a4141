"""A text tower's folder of Hugging Face's: config.json, the tokenizer's files and the weights.

Imports neither torch nor transformers, so that a wrong folder is refused at once.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aclip.config.recipe import Recipe
from aclip.config.sections import TextTowerConfig
from aclip.errors import ConfigError
from aclip.files import expand_home, write_whole, writing

CAUSAL = ("gpt2", "llama", "mistral", "qwen2", "qwen3")
BIDIRECTIONAL = ("bert", "distilbert", "electra", "roberta", "xlm-roberta")
FIELD = "model.text.name"
_CONFIG = "config.json"
_TOKENIZER = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)
_BESIDE_TOKENIZER = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")


@dataclass(frozen=True)
class TextFolder:
    """A folder that has been looked into.

    Attributes:
        path: the folder.
        values: its config.json.
        files: config.json and what belongs to the tokenizer; not the weights.
    """

    path: Path
    values: dict[str, Any]
    files: tuple[Path, ...]

    @property
    def is_causal(self) -> bool:
        """Whether a token reads only those before it."""
        return self.values["model_type"] in CAUSAL

    @property
    def vocab_size(self) -> int:
        return self.values["vocab_size"]

    @property
    def first_position(self) -> int:
        """The position of a caption's first token, which is not 0 in RoBERTa's."""
        is_roberta = self.values["model_type"] in ("roberta", "xlm-roberta")
        return self.values.get("pad_token_id", 1) + 1 if is_roberta else 0

    def digest(self) -> str:
        """What tells two folders apart that compute otherwise or tokenize otherwise."""
        digest = hashlib.sha256()
        for path in self.files:
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
            digest.update(path.read_bytes())
        return digest.hexdigest()


def read_text_folder(config: TextTowerConfig) -> TextFolder:
    """Looks into the folder that a recipe names.

    Raises:
        ConfigError: there is no such folder, it is no model of a kind that is known, or it does not
            fit the other keys of the section.
    """
    path = Path(expand_home(config.name, FIELD))
    problem = f"{FIELD} is {config.name}"
    if not path.is_dir():
        raise ConfigError(
            f"{problem}, which is no folder here; give a local folder with {_CONFIG}, a tokenizer "
            "and weights, as save_pretrained writes it (nothing is fetched)"
        )
    try:
        values = json.loads((path / _CONFIG).read_text(encoding="utf-8"))
        kind = values["model_type"]
        sizes = [values["vocab_size"], _positions(values)]
    except (OSError, UnicodeDecodeError, ValueError, LookupError, TypeError):
        raise ConfigError(
            f"{problem}, whose {_CONFIG} is missing or does not say model_type, vocab_size and the "
            "number of positions; give a folder that save_pretrained wrote"
        ) from None
    if kind not in CAUSAL + BIDIRECTIONAL or values.get("is_decoder"):
        raise ConfigError(
            f"{problem}, a model of the type {kind}, which is not among those that are known to "
            f"compute the same without padding; take one of {', '.join(CAUSAL + BIDIRECTIONAL)}"
        )
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ConfigError(f"{problem}, whose {_CONFIG} has the sizes {sizes}; correct it")
    found = [path / name for name in _TOKENIZER if (path / name).is_file()]
    if not found:
        raise ConfigError(
            f"{problem}, which holds no tokenizer ({', '.join(_TOKENIZER[:3])}, ...); put its "
            "files there"
        )
    if config.pretrained and not any(True for name in _WEIGHTS for _ in path.glob(name)):
        raise ConfigError(
            f"{problem}, which holds no weights (model.safetensors); put them there, or start at "
            "random with model.text.pretrained=false"
        )
    beside = [path / name for name in _BESIDE_TOKENIZER if (path / name).is_file()]
    folder = TextFolder(path, values, (path / _CONFIG, *sorted(found), *beside))
    _check_fit(config, folder)
    return folder


def record_text_folder(config: TextTowerConfig, out: Path) -> None:
    """Copies what a run must know of its folder, which is all but the weights.

    Raises:
        NotWritten: a file can't be written.
    """
    files = read_text_folder(config).files
    names = {path.name for path in files}
    for path in out.iterdir() if out.is_dir() else ():
        if path.name not in names:  # of an earlier run
            with writing(path):
                path.unlink()
    for path in files:
        content = path.read_bytes()
        copy = out / path.name
        if not copy.is_file() or copy.read_bytes() != content:
            write_whole(copy, content)


def with_recorded_text(recipe: Recipe, record: Path) -> Recipe:
    """A recipe whose text tower is built from what was recorded of its folder, for weights that lie
    elsewhere; the recipe itself where nothing was recorded."""
    if not recipe.model.text.name or not (record / _CONFIG).is_file():
        return recipe
    text = recipe.model.text.model_copy(update={"name": str(record), "pretrained": False})
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"text": text})})


def text_changes(config: TextTowerConfig, record: Path) -> Iterator[str]:
    """Where the folder of a run that goes on has other files than when it was recorded: as
    `recipe_changes` says it."""
    if config.name and (record / _CONFIG).is_file():
        recorded = config.model_copy(update={"name": str(record), "pretrained": False})
        then, now = (read_text_folder(each).digest()[:8] for each in (recorded, config))
        if then != now:
            yield f'{FIELD} "files {then}" -> "files {now}"'


def _positions(values: dict[str, Any]) -> int:
    """How many positions a model has, those that no token takes included."""
    return values["n_positions"] if "n_positions" in values else values["max_position_embeddings"]


def _check_fit(config: TextTowerConfig, folder: TextFolder) -> None:
    most = _positions(folder.values) - folder.first_position
    if folder.values.get("use_sliding_window", True):
        most = min(most, folder.values.get("sliding_window") or most)
    if config.context_length > most:
        raise ConfigError(
            f"model.text.context_length is {config.context_length}, but the model in {config.name} "
            f"reads {most} tokens at most; set it to {most} or less"
        )
    unfit = "cls" if folder.is_causal else "end"
    if config.pooling == unfit:
        reason = (
            "whose first token reads nothing of the caption; take end or mean"
            if folder.is_causal
            else "whose tokens read the whole caption; take cls or mean"
        )
        raise ConfigError(
            f"model.text.pooling is {unfit}, but {config.name} is a "
            f"{folder.values['model_type']}, {reason}"
        )
