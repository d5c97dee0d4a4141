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
from aclip.engine.host_copy import HostBuffers, Room, bounded, finish_copies, start_copy
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
    """Several pieces that are copied together, one behind the other.

    Attributes:
        is_apart: whether other ranks have parts that rank 0 lacks.
        host: the copy: on rank 0 with room for all elements; elsewhere this rank's own, if any.
        spans: (pieces, 2) int64, where among all elements this rank's part of each piece begins and
            how many elements it has; None where nothing has to be sent.
    """

    pieces: list[_Piece]
    dtype: torch.dtype
    is_apart: bool
    host: Tensor | None = None
    spans: Tensor | None = None

    @property
    def num_elements(self) -> int:
        return sum(piece.num_elements for piece in self.pieces)

    def own_parts(self, sharded: ShardedState) -> Iterator[tuple[int, Tensor]]:
        """Where this rank's part of each piece begins among all elements, and its values, 1-d."""
        before = 0
        for piece in self.pieces:
            if piece.storage is None:
                yield before, piece.parameter.flatten()
            elif (fragment := sharded.fragment(piece.parameter, piece.storage)) is None:
                yield before, piece.storage.new_empty(0)
            else:
                yield before + fragment.start, fragment.values
            before += piece.num_elements

    def room(self, sharded: ShardedState) -> Room | None:
        """What this rank takes for its copy; None for nothing."""
        on_gpu = sharded.device.type == "cuda"
        if rank() == 0:
            return Room(self.num_elements, self.dtype, pinned=on_gpu)
        if not self.is_apart or on_gpu:
            return None
        own = sum(len(values) for _, values in self.own_parts(sharded))
        return Room(own, self.dtype, pinned=False)

    def copy(self, sharded: ShardedState, buffers: HostBuffers) -> None:
        """Copies this rank's parts, and on a GPU sends them to rank 0."""
        # A frozen parameter may be in parts, but the ranks gather it like any weight.
        frozen = [piece.parameter for piece in self.pieces if piece.storage is None]
        with gathered(frozen):
            if rank() > 0 and not self.is_apart:
                return
            parts = list(self.own_parts(sharded))
            if sharded.device.type == "cuda":
                self._copy_on_gpu(parts, sharded.device, buffers)
                return
            if self.is_apart:
                self.spans = torch.tensor([(start, len(values)) for start, values in parts])
            self.host = buffers.take(*self.room(sharded))
            if rank() == 0:
                _fill(self.host, parts)
            else:
                torch.cat([values for _, values in parts], out=self.host)

    def _copy_on_gpu(
        self, parts: list[tuple[int, Tensor]], device: torch.device, buffers: HostBuffers
    ) -> None:
        flat = torch.zeros(self.num_elements, dtype=self.dtype, device=device)
        _fill(flat, parts)
        if self.is_apart:
            dist.reduce(flat, 0)
        if rank() == 0:
            self.host = start_copy(flat, buffers)

    def send(self, group: dist.ProcessGroup | None) -> None:
        """Sends rank 0 what it lacks; rank 0 calls `receive`."""
        dist.send(self.spans, 0, group)
        dist.send(self.host, 0, group)

    def receive(self, group: dist.ProcessGroup | None) -> None:
        num_elements = int(self.spans[:, 1].sum())
        for sender in range(1, world_size()):
            spans = torch.empty_like(self.spans)
            dist.recv(spans, sender, group)
            starts, sizes = spans.T.tolist()
            values = self.host.new_empty(sum(sizes))
            dist.recv(values, sender, group)
            _fill(self.host, list(zip(starts, values.split(sizes), strict=True)))
            num_elements += sum(sizes)
        # The memory still holds the copy before, which must not be taken for this one.
        if num_elements != self.num_elements:
            raise RuntimeError(f"the ranks hold {num_elements} of {self.num_elements} elements")


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
        self._chunks = list(_chunks(sharded))
        for chunk in self._chunks:
            chunk.copy(sharded, buffers)
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
            if chunk.spans is not None:
                (chunk.receive if rank() == 0 else chunk.send)(group)
        if rank() > 0:
            return {}
        copies = {}
        for chunk in self._chunks:
            parts = chunk.host.split([piece.num_elements for piece in chunk.pieces])
            for piece, part in zip(chunk.pieces, parts, strict=True):
                copies[piece.key] = part.view(whole_shape(piece.parameter))
        return copies


def rooms_of_snapshot(sharded: ShardedState) -> list[Room]:
    """What a Snapshot takes of the buffers, in its order, on this rank.

    Raises:
        ConfigError: see Snapshot.
    """
    rooms = [chunk.room(sharded) for chunk in _chunks(sharded)]
    return [room for room in rooms if room is not None]


def _chunks(sharded: ShardedState) -> Iterator[_Chunk]:
    """All that is copied."""
    together: dict[tuple[torch.dtype, bool], list[_Piece]] = {}
    for name, parameter in sharded.parameters.items():
        for kind, storage in sharded.storages(name).items():
            dtype = torch.float32 if storage is None else storage.dtype
            is_apart = sharded.stage > 0 and storage is not None and world_size() > 1
            piece = _Piece((name, kind), parameter, storage)
            together.setdefault((dtype, is_apart), []).append(piece)
    for (dtype, is_apart), pieces in together.items():
        for some in bounded(pieces, lambda piece: piece.num_elements):
            yield _Chunk(some, dtype, is_apart)


def _fill(flat: Tensor, parts: list[tuple[int, Tensor]]) -> None:
    for start, values in parts:
        flat[start : start + len(values)] = values
