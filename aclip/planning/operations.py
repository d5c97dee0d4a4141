"""Writes down every operation that runs, with its FLOPs and the bytes that it moves.

The tensors need no values. Bytes are those of arguments and results, once each, unless an operation
reads less of them or its kernels pass over them more often; views move nothing.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from aclip.kernels.common import MOVED_BYTES
from aclip.planning.meter import FORMULAS, tensors_in

VIEW_PREFIXES = ("empty", "new_empty", "_unsafe_view", "lift_fresh")
"""Operations that compute nothing, beside those that torch marks as views."""
CREATING = {"new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like"}
"""Read nothing of their argument but its shape."""
OVERWRITING = {"copy_", "fill_", "zero_", "_foreach_copy_"}
"""Do not read what they write to."""
READ_ROWS = {"index_select", "embedding", "gather", "index"}
"""Read as much of their first argument as they write."""
WRITE_ROWS = {"index_put_", "index_copy_", "scatter_"}
"""Change only as much of their first argument as their last one holds."""
FUSED = CREATING | {
    "_to_copy", "copy_", "clone", "fill_", "zero_", "cat", "stack", "sum", "mean",
    "native_layer_norm", "native_layer_norm_backward", "_softmax", "_softmax_backward_data",
    "_log_softmax", "_log_softmax_backward_data", "select_backward", "slice_backward",
}  # fmt: skip
"""What a compiler joins into one kernel, beside the operations that torch marks as pointwise."""


@dataclass(frozen=True)
class Operation:
    """What one operation asks of host and GPU.

    Attributes:
        name: torch's name of it, without its overload.
        part: the part of the step that it belongs to.
        flops: of its matrix products.
        in_bf16: whether these are in 16 bits.
        moved: bytes that it reads and writes in the GPU's memory.
        from_host: bytes that it copies from the host's memory.
        is_fused: whether a compiler would join it with its neighbours.
        reads, writes: bytes by the number of the storage.
        times: how often it runs in a step.
    """

    name: str
    part: str
    flops: int = 0
    in_bf16: bool = False
    moved: int = 0
    from_host: int = 0
    is_fused: bool = False
    reads: dict[int, int] = field(default_factory=dict)
    writes: dict[int, int] = field(default_factory=dict)
    times: int = 1


class OperationLog(TorchDispatchMode):
    """Keeps the operations that run inside `with log:`.

    Attributes:
        part: the part of the step that runs now.
        times: how often what runs now would run in a step.
        operations: what has run.
        sizes: bytes of each storage, by its number.
    """

    def __init__(self):
        super().__init__()
        self.part = ""
        self.times = 1
        self.operations: list[Operation] = []
        self.sizes: list[int] = []
        self._numbers: dict[int, int] = {}
        self._storages = []  # kept alive, so that no two ever have the same id
        counter = FlopCounterMode(display=False, custom_mapping=FORMULAS)
        self._formulas = counter.flop_registry

    def begin(self, part: str, times: int = 1) -> None:
        self.part, self.times = part, times

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not _is_free(func):
            self.operations.append(self._describe(func, args, kwargs, result))
        return result

    def _describe(self, func, args, kwargs, result) -> Operation:
        packet = func.overloadpacket
        name = packet.__name__
        flops = 0
        if packet in self._formulas:
            flops = int(self._formulas[packet](*args, **kwargs, out_val=result))
        inputs = tensors_in((args, kwargs))
        floats = [tensor for tensor in inputs if tensor.is_floating_point()]
        changed = _changed(func, args, kwargs)
        outputs = [*changed, *_without(tensors_in(result), inputs)]
        read = [] if name in CREATING else inputs
        if name in OVERWRITING:
            read = _without(read, changed)
        reads, writes = self._by_storage(read), self._by_storage(outputs)
        moved = sum(reads.values()) + sum(writes.values())
        if packet in MOVED_BYTES:
            moved = MOVED_BYTES[packet](*args, **kwargs)
        elif name in READ_ROWS:
            moved = 2 * sum(writes.values()) + sum(touched(each) for each in inputs[1:])
        elif name in WRITE_ROWS:
            moved = touched(inputs[-1]) + sum(touched(each) for each in inputs[1:])
        from_host = 0
        if name == "_to_copy" and inputs[0].is_cpu and not tensors_in(result)[0].is_cpu:
            moved, from_host = 0, tensors_in(result)[0].nbytes
        return Operation(
            name,
            self.part,
            flops,
            in_bf16=bool(floats) and floats[0].dtype in (torch.bfloat16, torch.float16),
            moved=moved,
            from_host=from_host,
            is_fused=not from_host and (name in FUSED or torch.Tag.pointwise in func.tags),
            reads=reads,
            writes=writes,
            times=self.times,
        )

    def _by_storage(self, tensors: Iterable[Tensor]) -> dict[int, int]:
        """Bytes that the tensors have in each storage, never more than it holds."""
        found = defaultdict(int)
        for tensor in {id(tensor): tensor for tensor in tensors}.values():
            found[self._number(tensor)] += touched(tensor)
        return {number: min(size, self.sizes[number]) for number, size in found.items()}

    def _number(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        number = self._numbers.setdefault(id(storage), len(self._storages))
        if number == len(self._storages):
            self._storages.append(storage)
            self.sizes.append(storage.nbytes())
        return number


def touched(tensor: Tensor) -> int:
    """Bytes of the elements that a tensor has in memory; what it repeats counts once."""
    elements = tensor.itemsize
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride or not size else 1
    return elements


def _is_free(func) -> bool:
    if func.namespace in ("prim", "profiler"):
        return True
    return func.is_view or func.overloadpacket.__name__.startswith(VIEW_PREFIXES)


def _changed(func, args, kwargs) -> list[Tensor]:
    """The arguments that an operation writes to."""
    values = dict(zip((each.name for each in func._schema.arguments), args, strict=False)) | kwargs
    return tensors_in(
        [
            values.get(each.name)
            for each in func._schema.arguments
            if each.alias_info is not None and each.alias_info.is_write
        ]
    )


def _without(tensors: list[Tensor], others: list[Tensor]) -> list[Tensor]:
    known = {id(tensor) for tensor in others}
    return [tensor for tensor in tensors if id(tensor) not in known]


def fuse(operations: list[Operation], sizes: list[int], parts: set[str]) -> list[Operation]:
    """The same step when a compiler joins what follows each other and can be joined.

    A chain is read once, and of what it makes only that is written which something else reads. It
    ends where another operation, such as a matrix product, stands between.

    Args:
        operations: a step, in order.
        sizes: bytes of each storage.
        parts: the parts that are compiled.
    """
    last_read = {number: i for i, each in enumerate(operations) for number in each.reads}
    result: list[Operation] = []
    chain: list[Operation] = []

    def close(end: int) -> None:
        if chain:
            result.append(_join(chain, sizes, last_read, end))
            chain.clear()

    for index, each in enumerate(operations):
        joins = each.is_fused and each.part in parts
        if chain and not (joins and (each.part, each.times) == (chain[0].part, chain[0].times)):
            close(index)
        if joins:
            chain.append(each)
        else:
            result.append(each)
    close(len(operations))
    return result


def _join(
    chain: list[Operation], sizes: list[int], last_read: dict[int, int], end: int
) -> Operation:
    """One operation in place of a chain that ends before the operation `end`."""
    reads: dict[int, int] = {}
    writes: dict[int, int] = {}
    for each in chain:
        for number, size in each.reads.items():
            if number not in writes:
                reads[number] = min(reads.get(number, 0) + size, sizes[number])
        for number, size in each.writes.items():
            writes[number] = min(writes.get(number, 0) + size, sizes[number])
    # What nothing ever reads is a result of the step, such as a gradient.
    inside = {n for n in writes if n in last_read and last_read[n] < end and n not in reads}
    writes = {number: size for number, size in writes.items() if number not in inside}
    first = chain[0]
    moved = sum(reads.values()) + sum(writes.values())
    return Operation(
        "fused", first.part, moved=moved, reads=reads, writes=writes, times=first.times
    )
