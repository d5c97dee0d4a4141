"""Measures of a step that need no GPU."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


def saved_activation_bytes(forward: Callable[[], Any], modules: Iterable[nn.Module]) -> int:
    """Bytes that autograd keeps from a forward pass until its backward pass.

    Each piece of memory counts once, however many tensors are views of it; parameters and buffers
    of the modules don't count. What is kept only as the inputs of a checkpoint counts too.

    Args:
        forward: runs the pass; its result is held while the bytes are counted.
        modules: whose weights are left out.
    """
    weights = {
        tensor.untyped_storage().data_ptr()
        for module in modules
        for tensor in (*module.parameters(), *module.buffers())
    }
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            # Held, or memory that is freed and used again would count once for both uses.
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()
    num_bytes = sum(storage.nbytes() for storage in kept.values())
    del result
    return num_bytes
