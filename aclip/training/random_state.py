"""The random state of this rank's CPU and device; only dropout in the towers reads it."""

import torch
from torch import Tensor


def get_random_state() -> dict[str, Tensor]:
    """The generators' states by device type."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_state(states: dict[str, Tensor]) -> None:
    """Restores what get_random_state returned; a device that is absent here is left alone."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
