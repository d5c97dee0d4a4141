"""The fp32 masters and the optimizer's state of one moment, copied while training stands still.

GPUs send their parts to rank 0 at once. On CPUs, where that takes ten times as long as the copies,
each rank copies its own parts, and they are sent later, in a thread.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from aclip.distributed import rank, world_size
from aclip.engine.host_copy import HostBuffers, bounded, finish_copies, start_copy
from aclip.engine.sharded_state import ShardedState, gathered, whole_shape

Key = tuple[str, str]
"""A parameter's name, and "master" or the optimizer's own name for a state, such as exp_avg."""


@dataclass
class _Piece:
    """What is copied of one parameter, and the flat tensor that this rank's part lies in; None for
    a frozen parameter, which has no other master than itself."""

    key: Key
    parameter: nn.Parameter
    storage: Tensor | None

    @property
    def num_elements(self) -> int:
        return whole_shape(self.parameter).numel()


@dataclass
class _Chunk:
    """Several pieces, one behind the other, in one flat tensor.

    Attributes:
        shapes: of the whole tensors.
        host: on rank 0 with room for all elements; elsewhere this rank's own, if rank 0 lacks them.
        spans: (pieces, 2) int64, where in the whole chunk this rank's part of each piece begins and
            how many elements it has; None where rank 0 has everything.
    """

    shapes: dict[Key, torch.Size]
    host: Tensor | None = None
    spans: Tensor | None = None


class Snapshot:
    """Copies of a state in host memory. A collective, in few large pieces: every rank makes one.

    What training does afterwards does not reach the copies.

    Args:
        sharded: whose state it is.
        buffers: hold the copies.

    Raises:
        ConfigError: on every rank, if the optimizer keeps what is neither a tensor of the
            parameter's shape nor a scalar.
    """

    @torch.no_grad()
    def __init__(self, sharded: ShardedState, buffers: HostBuffers):
        self._chunks = [
            _copy(sharded, pieces, dtype, is_cut, buffers)
            for pieces, dtype, is_cut in _pieces(sharded)
        ]
        finish_copies()

    @torch.no_grad()
    def collect(self, group: dist.ProcessGroup | None = None) -> dict[Key, Tensor]:
        """Sends to rank 0 what is not there yet. A collective of the group, in any thread.

        Args:
            group: of all ranks; None for the default one, which training uses.

        Returns:
            Whole tensors by parameter and kind. Frozen parameters have a master only. Empty on the
            other ranks.
        """
        for chunk in self._chunks:
            if chunk.spans is None:
                continue
            if rank() == 0:
                _receive(chunk, group)
            else:
                dist.send(chunk.spans, 0, group)
                dist.send(chunk.host, 0, group)
            chunk.spans = None
        if rank() > 0:
            return {}
        copies = {}
        for chunk in self._chunks:
            parts = chunk.host.split([shape.numel() for shape in chunk.shapes.values()])
            for (key, shape), part in zip(chunk.shapes.items(), parts, strict=True):
                copies[key] = part.view(shape)
        return copies


def _pieces(sharded: ShardedState) -> Iterator[tuple[list[_Piece], torch.dtype, bool]]:
    """All that is copied, cut into lists of one dtype, and whether ZeRO has cut these."""
    together: dict[tuple[torch.dtype, bool], list[_Piece]] = {}
    for name, parameter in sharded.parameters.items():
        for kind, storage in sharded.storages(name).items():
            dtype = torch.float32 if storage is None else storage.dtype
            key = dtype, sharded.stage > 0 and storage is not None
            together.setdefault(key, []).append(_Piece((name, kind), parameter, storage))
    for key, pieces in together.items():
        for some in bounded(pieces, lambda piece: piece.num_elements):
            yield some, *key


def _copy(
    sharded: ShardedState,
    pieces: list[_Piece],
    dtype: torch.dtype,
    is_cut: bool,
    buffers: HostBuffers,
) -> _Chunk:
    chunk = _Chunk({piece.key: whole_shape(piece.parameter) for piece in pieces})
    size = sum(piece.num_elements for piece in pieces)
    is_apart = is_cut and world_size() > 1
    # A frozen parameter may be in parts, but the ranks gather it like any weight.
    with gathered([] if is_cut else [piece.parameter for piece in pieces]):
        parts = list(_own_parts(sharded, pieces))
        if rank() > 0 and not is_apart:
            return chunk
        if sharded.device.type == "cuda":
            flat = torch.zeros(size, dtype=dtype, device=sharded.device)
            _fill(flat, parts)
            if is_apart:
                dist.reduce(flat, 0)
            if rank() == 0:
                chunk.host = start_copy(flat, buffers)
            return chunk
        if is_apart:
            chunk.spans = torch.tensor([(start, len(values)) for start, values in parts])
        if rank() > 0:
            ends = torch.cumsum(chunk.spans[:, 1], 0).tolist()
            size = ends[-1]
            parts = [
                (end - len(values), values) for end, (_, values) in zip(ends, parts, strict=True)
            ]
        chunk.host = buffers.take(size, dtype, pinned=False)
        _fill(chunk.host, parts)
    return chunk


def _own_parts(sharded: ShardedState, pieces: list[_Piece]) -> Iterator[tuple[int, Tensor]]:
    """This rank's part of each piece, 1-d, and where in the whole chunk it begins."""
    before = 0
    for piece in pieces:
        if piece.storage is None:
            yield before, piece.parameter.flatten()
        else:
            fragment = sharded.fragment(piece.parameter, piece.storage)
            if fragment is None:
                yield before, piece.storage.new_empty(0)
            else:
                yield before + fragment.start, fragment.values
        before += piece.num_elements


def _fill(flat: Tensor, parts: list[tuple[int, Tensor]]) -> None:
    for start, values in parts:
        flat[start : start + len(values)] = values


def _receive(chunk: _Chunk, group: dist.ProcessGroup | None) -> None:
    """On rank 0: fills what the other ranks have of a chunk."""
    num_elements = int(chunk.spans[:, 1].sum())
    for sender in range(1, world_size()):
        spans = torch.empty_like(chunk.spans)
        dist.recv(spans, sender, group)
        sizes = spans[:, 1].tolist()
        values = chunk.host.new_empty(sum(sizes))
        dist.recv(values, sender, group)
        _fill(chunk.host, list(zip(spans[:, 0].tolist(), values.split(sizes), strict=True)))
        num_elements += sum(sizes)
    if num_elements != len(chunk.host):
        raise RuntimeError(f"the ranks hold {num_elements} of {len(chunk.host)} elements")
