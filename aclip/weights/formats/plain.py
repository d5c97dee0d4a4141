"""aclip's own names in one safetensors file, for whoever loads weights by hand, and for --init."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from aclip.weights.first_look import PLAIN_WEIGHTS
from aclip.weights.names import TEXT_SIDE, TowerFacts

WEIGHTS = PLAIN_WEIGHTS


def is_plain(state: dict[str, Tensor]) -> bool:
    """Whether the keys are aclip's own."""
    return "image.vit.patch_embed.proj.weight" in state


def is_of_model(key: str) -> bool:
    """Whether a key of aclip's own belongs to the model, and not to heads of training."""
    return key.startswith((*TEXT_SIDE, "image.", "image_projection.", "logit_"))


def from_plain(key: str, tensor: Tensor) -> dict[str, Tensor]:
    return {key: tensor}


def write(path: Path, state: dict[str, Tensor], facts: TowerFacts) -> None:
    """Writes a state with aclip's names, and what shapes don't tell as the file's metadata.

    The same model gives the same bytes, so that the Hub knows a file that it has already.
    """
    metadata = {"format": "pt"}
    metadata |= {name: str(value) for name, value in vars(facts).items() if value is not None}
    save_file(state, path, metadata)
    _sort_metadata(path)


def _sort_metadata(path: Path) -> None:
    """Brings a file's metadata into an order, since safetensors writes them in none."""
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        file.seek(8)
        file.write(text.ljust(length))


def read_facts(path: Path) -> TowerFacts:
    """What a file's metadata tells of its towers; nothing for other files."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError):
        return TowerFacts()
    numbers = {name: metadata.get(name, "") for name in ("image_heads", "text_heads")}
    heads = {name: int(n) for name, n in numbers.items() if n.isdigit()}
    return TowerFacts(**heads, image_activation=metadata.get("image_activation"))
