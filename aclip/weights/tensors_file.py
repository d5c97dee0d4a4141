"""Reads a file of weights to tensors by name, and runs no code that the file holds."""

import argparse
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

# What torch's reader raises on bytes that are no checkpoint.
READ_ERRORS = (
    pickle.UnpicklingError,
    OSError,
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    OverflowError,
    struct.error,
    zipfile.BadZipFile,
)
NESTED = ("state_dict", "model")
"""Keys under which training scripts save the weights."""


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The weights in a .safetensors file or one that torch.save wrote, by name.

    Raises:
        ValueError: it is neither, holds objects whose loading would run code, or no weights; the
            message ends a sentence that begins with the file.
    """
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    for name in NESTED:
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
            break
    is_state = isinstance(content, dict) and all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
    )
    if not is_state or not content:
        raise ValueError("holds no weights by name")
    return {name.removeprefix("module."): tensor for name, tensor in content.items()}


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"is no safetensors file ({_one_line(error)})") from None


def _read_torch(path: Path) -> Any:
    try:
        # Optimizer state is not read from the disk when the file can be mapped.
        mapped = zipfile.is_zipfile(path)
        # SLIP and A-CLIP keep their command line in the file.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except READ_ERRORS as error:
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
            reason = "holds objects other than weights, whose loading could run code"
        else:
            reason = "is no checkpoint that torch can read"
        raise ValueError(reason) from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
