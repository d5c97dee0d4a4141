"""Counts what operations compute, keep and send, on tensors that need no values."""

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

FUSED_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FUSED_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class Flops:
    """Matrix products alone, two operations a multiply-add, of the forward and backward pass."""

    forward: float = 0.0
    backward: float = 0.0

    @property
    def total(self) -> float:
        return self.forward + self.backward

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.forward + other.forward, self.backward + other.backward)


class Meter(TorchDispatchMode):
    """Counts the operations that run inside of `with meter:`, in phases of one part's work each.

    Elementwise work, softmax and norms count as no FLOPs, nor does the remap of `attentive_pack`.

    Attributes:
        part: whose work it is, where no child of a model is at work (see name_parts).
        held: bytes that the phase has made and that are still alive, gradients left out. At the end
            of a forward pass that is what autograd keeps of it.
        peak: the most that was held, of the forward pass or, once it turns back, of the backward
            pass, which holds more than it found where it recomputes something.
        collectives: bytes gathered, and twice those reduced, since that takes a scatter and a
            gather.
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
        """Begins a phase: the forward pass of so many samples."""
        self.part, self._num_samples, self._in_backward = part, num_samples, False
        self.held = self.peak = 0
        self._phase += 1

    def turn_back(self) -> None:
        """Begins the phase's backward pass."""
        self._in_backward = True
        self.peak = self.held

    def take_flops(self) -> dict[str, Flops]:
        """One sample's FLOPs since the last call, by part."""
        taken, self._flops = dict(self._flops), defaultdict(Flops)
        return taken

    def name_parts(self, model: nn.Module) -> None:
        """Makes each child of the model a part: what its public methods do, and its backward pass.

        A child that another one calls stays a part of its own.
        """
        for name, child in model.named_children():
            methods = {"forward"} | set(dir(type(child))) - set(dir(nn.Module))
            for method in methods:
                if not method.startswith("_") and callable(getattr(child, method)):
                    setattr(child, method, self._as_part(name, getattr(child, method)))

    def _as_part(self, part: str, function: Callable) -> Callable:
        def enter(_) -> None:
            self.part = part

        def run(*args, **kwargs):
            caller, self.part = self.part, part
            result = function(*args, **kwargs)
            self.part = caller
            for tensor in _tensors(result):
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
        # A backward pass that runs something again does so with gradients enabled.
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
        num_bytes = sum(tensor.nbytes for tensor in _tensors(tensors))
        self.collectives += num_bytes * (2 if "allreduce" in func.name() else 1)

    def _hold(self, args, kwargs, result) -> None:
        """Adds the memory that an operation made, until it is freed; a view makes none."""
        known = {id(tensor.untyped_storage()) for tensor in _tensors((args, kwargs))}
        for tensor in _tensors(result):
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
    """Inside, attention is one operation that keeps no matrix of scores, as on a GPU.

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


def _tensors(tree) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _attention(query, key, value, *_, out_shape=None, **__) -> int:
    """Scores and weighted sum; a causal mask halves nothing."""
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _attention_backward(grad, query, key, value, *_, out_shape=None, **__) -> int:
    """Two products for each of the forward pass; the scores that the kernel computes again are left
    out, as everywhere in figures of MFU."""
    return 2 * _attention(query, key, value)


def _cls_attention_scores(query, key, scores, weight, out_shape=None) -> int:
    return 2 * math.prod(key)


def _contrastive_loss(
    rows, columns, scale, offset, chunk, grad_rows, grad_columns, out_shape=None
) -> int:
    """The logits, and the gradients that the op computes with them."""
    return 2 * math.prod(rows) * columns[0] * (1 + grad_rows + grad_columns)


def _logits_of_a_chunk(rows, columns, scale, offset, chunk, grad_rows, grad_columns) -> int:
    return min(chunk, len(rows)) * len(columns) * rows.itemsize


FORMULAS = {
    FUSED_ATTENTION: _attention,
    FUSED_ATTENTION_BACKWARD: _attention_backward,
    torch.ops.aclip.cls_attention_scores: _cls_attention_scores,
    torch.ops.aclip.contrastive_loss: _contrastive_loss,
}
"""FLOPs by the shapes of an operation's arguments, beside those that torch knows."""

WORK_SPACE = {torch.ops.aclip.contrastive_loss: _logits_of_a_chunk}
"""Bytes that exist only inside of an operation, by its arguments."""
