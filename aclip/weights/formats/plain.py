"""aclip's own names in one safetensors file, for whoever loads weights by hand, and for --init."""

from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from aclip.weights.names import TowerFacts

WEIGHTS = "model.safetensors"


def is_plain(state: dict[str, Tensor]) -> bool:
    """Whether the keys are aclip's own."""
    return "image.vit.cls_token" in state


def from_plain(key: str, tensor: Tensor) -> dict[str, Tensor]:
    return {key: tensor}


def write(path: Path, state: dict[str, Tensor], facts: TowerFacts) -> None:
    """Writes a state with aclip's names, and the numbers of heads as the file's metadata."""
    metadata = {"format": "pt"}
    metadata |= {name: str(n) for name, n in vars(facts).items() if n is not None}
    save_file(state, path, metadata)


def read_facts(path: Path) -> TowerFacts:
    """The numbers of heads that a file's metadata tells; none for other files."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError):
        return TowerFacts()
    numbers = {name: metadata.get(name, "") for name in ("image_heads", "text_heads")}
    return TowerFacts(**{name: int(n) for name, n in numbers.items() if n.isdigit()})
