"""A file of weights: read to tensors by name, without running code that it holds, and written."""

import argparse
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from aclip.errors import NotWritten
from aclip.files import not_written

# What torch's reader raises on bytes that are no checkpoint.
MOST_SHOWN = 80
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
NESTED = ("state_dict", "model", "model_state_dict", "module")
"""Keys under which training scripts save the weights."""
_ANYWHERE = re.compile(r"(^|\.)(module|_orig_mod)\.")
"""What DistributedDataParallel and torch.compile put into names, where they wrap a part too."""
_IN_FRONT = ("model.", "net.", "clip.", "backbone.")
"""What stands in front of all names where the model is a part of another one, as in Lightning."""


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
        found = f"the keys {', '.join(map(str, content))}" if isinstance(content, dict) else ""
        raise ValueError(
            f"holds no weights by name, but {found[:MOST_SHOWN] or type(content).__name__}; give "
            "the file that holds the model's state_dict"
        )
    return _without_wrappers(content)


@contextmanager
def writing_tensors(path: Path) -> Iterator[None]:
    """Turns the error of safetensors for a file that can't be written, which is no OSError, into
    NotWritten about `path`."""
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        known = (int(number[1]), os.strerror(int(number[1]))) if number else (_one_line(error),)
        raise NotWritten(not_written(path, OSError(*known))) from error


def _without_wrappers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        short = name
        while (shorter := _ANYWHERE.sub(r"\1", short)) != short:
            short = shorter
        if short in plain:
            raise ValueError(f"holds {short} twice, with and without the prefix of a wrapper")
        plain[short] = tensor
    for prefix in _IN_FRONT:
        if all(name.startswith(prefix) for name in plain):
            return {name.removeprefix(prefix): tensor for name, tensor in plain.items()}
    return plain


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
            named = re.search(r"GLOBAL ([\w.]+)", str(error))
            reason = (
                f"holds objects other than weights{f' ({named[1]})' if named else ''}, whose "
                "loading could run code; if you trust it, load it yourself with torch.load(..., "
                "weights_only=False) and save its state_dict alone"
            )
        else:
            reason = f"is no checkpoint that torch can read (it begins with {_beginning(path)})"
        raise ValueError(reason) from None


def _beginning(path: Path) -> str:
    with open(path, "rb") as file:
        head = file.read(24)
    return (
        repr(head.decode()) if head.isascii() and b"\0" not in head else f"bytes {head[:8].hex()}"
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
