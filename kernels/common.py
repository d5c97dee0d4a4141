"""What every op shares: the choice of backend and the checks of its arguments."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton reads the variable where a kernel is defined: set it before the first import."""

WORK_SPACE: dict[torch._ops.OpOverloadPacket, Callable[..., int]] = {}
"""Gives the bytes that an op holds only while it runs, from its arguments, where they are many."""

MOVED_BYTES: dict[torch._ops.OpOverloadPacket, Callable[..., int]] = {}
"""Gives the bytes that an op's kernels read and write, from its arguments, where these are not its
arguments and results once each."""

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def use_triton(tensor: Tensor) -> bool:
    """Whether an op runs its Triton kernel on `tensor`: on CUDA, and under Triton's interpreter.

    `ACLIP_KERNELS=reference` forces the reference everywhere, to find out whether a kernel is to
    blame for a run that went wrong.
    """
    choice = os.environ.get("ACLIP_KERNELS", "auto")
    if choice not in ("auto", "reference"):
        raise ValueError(f"ACLIP_KERNELS is {choice!r}; set it to 'reference', or unset it.")
    return choice == "auto" and (tensor.is_cuda or INTERPRET)


def check_shape(name: str, tensor: Tensor, expected: tuple[int | None, ...]) -> None:
    """Raises ValueError naming the argument unless its shape is `expected`; None is any size."""
    fits = tensor.dim() == len(expected) and all(
        want is None or have == want for have, want in zip(tensor.shape, expected, strict=True)
    )
    if not fits:
        want = ", ".join("any" if size is None else str(size) for size in expected)
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be ({want}).")


def check_dtype(name: str, tensor: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    """Raises ValueError naming the argument unless its dtype is one of `allowed`."""
    if tensor.dtype not in allowed:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise ValueError(f"{name} has dtype {tensor.dtype}; it must be one of: {names}.")


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    """Raises ValueError naming the argument unless it lies on `device`."""
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}; it must be on {device} like the others.")


def on_device_of(tensor: Tensor) -> AbstractContextManager:
    """Triton launches on the current CUDA device; this makes it the tensor's own."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
