"""Counts what operations compute, keep and send; the tensors need no values.

FLOPs are those of matrix products, two for a multiply-add. Elementwise work, softmax, norms and the
remap inside attentive_pack are left out: together well under 1 % of a step.
"""

import math
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from aclip.kernels.common import WORK_SPACE

FUSED_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FUSED_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class Flops:
    """FLOPs of a forward and of its backward pass."""

    forward: float = 0.0
    backward: float = 0.0

    @property
    def total(self) -> float:
        return self.forward + self.backward

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.forward + other.forward, self.backward + other.backward)


def add_up(parts: dict[str, Flops]) -> Flops:
    """The sum over all parts."""
    return sum(parts.values(), Flops())


def merge(first: dict[str, Flops], second: dict[str, Flops]) -> dict[str, Flops]:
    """The parts of both; parts of the same name are added."""
    names = dict.fromkeys([*first, *second])
    return {name: first.get(name, Flops()) + second.get(name, Flops()) for name in names}


def scaled(parts: dict[str, Flops], share: float) -> dict[str, Flops]:
    """Each part times a share."""
    return {name: Flops(share * f.forward, share * f.backward) for name, f in parts.items()}


class Meter(TorchDispatchMode):
    """Counts the operations that run inside `with meter:`, phase by phase.

    Attributes:
        part: the name under which FLOPs are counted while no named module is at work.
        held: bytes that the phase has made and that are still alive, without gradients. When a
            forward pass has ended, that is what autograd keeps of it.
        peak: the most bytes held at a time in the phase's forward pass; after `turn_back`, in its
            backward pass, which holds more than it found only where it recomputes something.
        collectives: bytes gathered, plus twice the bytes reduced, since a reduction scatters and
            then gathers.
    """

    def __init__(self):
        super().__init__()
        self.part = ""
        self.held = self.peak = self.collectives = 0
        self._flops: dict[str, Flops] = defaultdict(Flops)
        self._phase, self._num_samples, self._in_backward = 0, 1, False
        counter = FlopCounterMode(display=False, custom_mapping=FORMULAS)
        self._formulas = counter.flop_registry

    def begin(self, part: str, num_samples: int) -> None:
        """Begins a phase with its forward pass, which reads so many samples."""
        self.part, self._num_samples, self._in_backward = part, num_samples, False
        self.held = self.peak = 0
        self._phase += 1

    def turn_back(self) -> None:
        """Goes on to the phase's backward pass."""
        self._in_backward = True
        self.peak = self.held

    def take_flops(self) -> dict[str, Flops]:
        """The FLOPs per sample since the last call, by part."""
        taken, self._flops = dict(self._flops), defaultdict(Flops)
        return taken

    def name_parts(self, model: nn.Module) -> None:
        """Counts what a child of the model computes in its public methods, and the backward pass of
        their results, under the child's name. What it calls of another child is that child's."""
        for name, child in model.named_children():
            methods = {"forward"} | set(dir(type(child))) - set(dir(nn.Module))
            for method in methods:
                if not method.startswith("_") and callable(getattr(child, method)):
                    setattr(child, method, self.as_part(name, getattr(child, method)))

    def as_part(self, part: str, function: Callable) -> Callable:
        """The function, of which what it computes and the backward pass of its results count under
        the part's name."""

        def enter(_) -> None:
            self.part = part

        def run(*args, **kwargs):
            caller, self.part = self.part, part
            result = function(*args, **kwargs)
            self.part = caller
            for tensor in tensors_in(result):
                if tensor.requires_grad:
                    tensor.register_hook(enter)
            return result

        return run

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        operation = func.overloadpacket
        if operation in self._formulas:
            self._add_flops(self._formulas[operation](*args, **kwargs, out_val=result))
        elif func.namespace == "c10d":
            self._add_collective(func, args[0])
        # When a backward pass computes something again, gradients are enabled.
        if not self._in_backward or torch.is_grad_enabled():
            self._hold(args, kwargs, result)
        if not self._in_backward or not torch.is_grad_enabled():
            inside = WORK_SPACE[operation](*args) if operation in WORK_SPACE else 0
            self.peak = max(self.peak, self.held + inside)
        return result

    def _add_flops(self, flops: int) -> None:
        each = flops / self._num_samples
        self._flops[self.part] += Flops(0.0, each) if self._in_backward else Flops(each)

    def _add_collective(self, func, tensors) -> None:
        num_bytes = sum(tensor.nbytes for tensor in tensors_in(tensors))
        self.collectives += num_bytes * (2 if "allreduce" in func.name() else 1)

    def _hold(self, args, kwargs, result) -> None:
        """Counts the memory that an operation has made until it is freed; a view makes none."""
        known = {id(tensor.untyped_storage()) for tensor in tensors_in((args, kwargs))}
        for tensor in tensors_in(result):
            storage = tensor.untyped_storage()
            if id(storage) not in known:
                known.add(id(storage))
                self.held += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes(), self._phase)

    def _free(self, num_bytes: int, phase: int) -> None:
        if phase == self._phase:
            self.held -= num_bytes


@contextmanager
def fused_attention() -> Iterator[None]:
    """Makes attention a single operation that keeps no matrix of scores, as it is on a GPU.

    On the meta device torch would take it apart.
    """
    plain = F.scaled_dot_product_attention

    def attend(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None):
        return FUSED_ATTENTION(
            query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
        )[0]

    F.scaled_dot_product_attention = attend
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain


def tensors_in(tree) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _attention(query, key, value, *_, out_shape=None, **__) -> int:
    """The scores and the weighted sum; a causal mask halves nothing."""
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _attention_backward(grad, query, key, value, *_, out_shape=None, **__) -> int:
    """Two products for each one of the forward pass. The kernel also computes the scores again,
    which is left out, as figures of MFU always leave it out."""
    return 2 * _attention(query, key, value)


FORMULAS = {FUSED_ATTENTION: _attention, FUSED_ATTENTION_BACKWARD: _attention_backward}
"""Each operation's FLOPs from its arguments' shapes, for what torch has no formula. The ops of
aclip.kernels bring their own."""
