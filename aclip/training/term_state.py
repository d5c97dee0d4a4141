"""What loss terms count from step to step, in checkpoints."""

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from aclip.errors import ConfigError
from aclip.method.losses.term import LossTerm
from aclip.run_folder.checkpoint_folder import TERMS


def state_of_terms(terms: tuple[LossTerm, ...]) -> dict[str, Tensor]:
    """What the terms count, as TERM/NAME."""
    return {
        f"{term.name}/{name}": value for term in terms for name, value in term.state_dict().items()
    }


def load_terms(folder: Path, terms: tuple[LossTerm, ...], may_begin: bool = False) -> None:
    """Loads what the loss terms have counted.

    Args:
        may_begin: whether a term that the checkpoint does not know begins to count.

    Raises:
        ConfigError: the checkpoint lacks what a term has counted, and it may not begin.
    """
    needed = state_of_terms(terms).keys()
    saved = load_file(folder / TERMS) if (folder / TERMS).is_file() else {}
    missing = sorted(needed - saved.keys())
    if missing and not may_begin:
        raise ConfigError(
            f"--resume loads {folder}, which does not hold {missing[0]} of the loss's terms; use "
            "the recipe of that run, or --resume none with another --output"
        )
    for term in terms:
        prefix = f"{term.name}/"
        own = {k.removeprefix(prefix): v for k, v in saved.items() if k.startswith(prefix)}
        if own or not may_begin:
            term.load_state_dict(own)
