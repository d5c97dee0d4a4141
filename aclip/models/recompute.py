"""What the backward pass computes again instead of keeping it: memory for time, exactly.

- none: everything is kept.
- elementwise: outputs of norms and activations are computed again from their inputs, which are kept
  anyway, wherever a linear reads them. No matrix product runs twice.
- blocks: of each block only its input is kept; the whole block runs again, about a third more time.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from aclip.config.sections import Recompute


def run_block(
    recompute: Recompute, function: Callable, *args, draws_random: bool = False
) -> Tensor:
    """function(*args); with `blocks` only its arguments are kept for the backward pass.

    Args:
        draws_random: whether the function draws random numbers, which are then drawn again alike.
    """
    if recompute == "blocks" and torch.is_grad_enabled():
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=draws_random)
    return function(*args)


def drops_values(module: nn.Module) -> bool:
    """Whether a module drops values or paths at random in training."""
    rates = ("p", "drop_prob")
    return any(getattr(part, rate, 0.0) for part in module.modules() for rate in rates)


def applied(
    recompute: Recompute, function: Callable[[Tensor], Tensor], x: Tensor
) -> AbstractContextManager[Tensor]:
    """Gives function(x) to the `with` body; with `elementwise`, what the body keeps of it is
    computed again in the backward pass.

    Args:
        function: a cheap function of one tensor with the same result at every call. It may call
            modules, also ones whose weights ZeRO-3 partitions: their hooks gather them each time.
        x: the tensor, which the graph keeps anyway.
    """
    if recompute != "elementwise" or not torch.is_grad_enabled():
        return nullcontext(function(x))
    if torch.compiler.is_compiling():
        # The compiler can't trace the hooks; to it, a checkpoint of the function says the same.
        return nullcontext(checkpoint(function, x, use_reentrant=False))
    return _recomputed(function, x)


@contextmanager
def _recomputed(function: Callable[[Tensor], Tensor], x: Tensor):
    y = function(x)
    # By identity, not by address: on the meta device every address is 0.
    storage = id(y.untyped_storage())

    def pack(tensor: Tensor):
        # A linear keeps its input in another shape, so it is known by its memory.
        if id(tensor.untyped_storage()) == storage:
            return tensor.shape, tensor.stride(), tensor.storage_offset()
        return tensor

    def unpack(kept) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        with torch.no_grad():
            return function(x).as_strided(*kept)

    with saved_tensors_hooks(pack, unpack):
        yield y
