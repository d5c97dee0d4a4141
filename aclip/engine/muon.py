"""Muon under every ZeRO stage: the matrices of the towers' blocks; AdamW updates the rest.

DeepSpeed's own Muon (0.19.8) orthogonalises in the backward pass, so that the gradient's norm and
its clipping see the update, and keeps momentum that no other number of ranks can read. Here the
momentum lies in ZeRO's flat buffers like any optimizer's state, and only the update is put together
from the ranks' parts.
"""

import torch
import torch.distributed as dist
from timm.optim.muon import get_lr_scale, zeropower_via_newtonschulz
from torch import Tensor, nn

from aclip.distributed import rank, world_size
from aclip.engine.host_copy import bounded
from aclip.engine.sharded_state import whole_shape

MOMENTUM = 0.95
COEFFICIENTS, ITERATIONS = [(3.4445, -4.7750, 2.0315)], 5
"""The quintic of Newton and Schulz, https://kellerjordan.github.io/posts/muon."""
PRECISION = torch.bfloat16
"""What matrices are orthogonalised in, and sent in before and after."""


class Muon(torch.optim.AdamW):
    """AdamW, but for the groups that are `orthogonal`.

    Their update is the Nesterov momentum of the gradient, made orthogonal and scaled to the size of
    AdamW's updates. Sources: https://kellerjordan.github.io/posts/muon; the scale is that of
    arXiv:2502.16982, equation 4.

    Args:
        groups: parameter groups with `orthogonal`, whose parameters are matrices where it is true.
        settings: AdamW's.

    Attributes:
        matrices: the model's parameters that it orthogonalises.
    """

    def __init__(self, groups: list[dict], **settings):
        super().__init__(groups, **settings)
        self.matrices = [p for g in self.param_groups if g["orthogonal"] for p in g["params"]]
        self._sharded = None
        self._by_flat: dict[Tensor, list[nn.Parameter]] = {p: [p] for p in self.matrices}

    def put_together_from(self, sharded) -> None:
        """Says where ZeRO keeps the matrices.

        Args:
            sharded: the engine's ShardedState.
        """
        self._sharded = sharded
        self._by_flat = {}
        for parameter in self.matrices:
            self._by_flat.setdefault(sharded.flat(parameter), []).append(parameter)

    @torch.no_grad()
    def step(self, closure=None):
        """Updates the parameters. Under ZeRO a collective: every rank calls."""
        everything = self.param_groups
        self.param_groups = [group for group in everything if not group["orthogonal"]]
        loss = super().step(closure)
        self.param_groups = everything
        for group in everything:
            for flat in group["params"] if group["orthogonal"] else []:
                if flat.grad is not None:
                    self._update_matrices(flat, group)
        return loss

    def _update_matrices(self, flat: Tensor, group: dict) -> None:
        state = self.state[flat]
        if state.get("momentum_buffer") is None:
            state["momentum_buffer"] = torch.zeros_like(flat)
        # Counted for checkpoints alone, which hold numbers that are the same for all parameters.
        state.setdefault("step", torch.zeros((), device=flat.device)).add_(1)
        momentum = state["momentum_buffer"].lerp_(flat.grad, 1 - MOMENTUM)
        update = flat.grad.lerp(momentum, MOMENTUM)
        flat.mul_(1 - group["lr"] * group["weight_decay"])
        for parameters in bounded(self._by_flat[flat], _num_elements):
            # Each rank orthogonalises some of the whole matrices for all.
            whole = [_zeros(parameter, flat.device) for parameter in parameters]
            for matrix, parameter in zip(whole, parameters, strict=True):
                part, start = self._own_part(parameter, update)
                matrix.view(-1)[start : start + part.numel()] = part
            whole = self._sum(whole)
            shares = self._shares(parameters)
            for index, (matrix, owner) in enumerate(zip(whole, shares, strict=True)):
                mine = owner is None or owner == rank()
                whole[index] = orthogonal(matrix) if mine else torch.zeros_like(matrix)
            whole = self._sum(whole)
            for matrix, parameter in zip(whole, parameters, strict=True):
                part, start = self._own_part(parameter, flat)
                step = matrix.reshape(-1)[start : start + part.numel()]
                part.add_(step, alpha=-group["lr"] * get_lr_scale(matrix.shape))

    @property
    def _is_apart(self) -> bool:
        return self._sharded is not None and world_size() > 1

    def _own_part(self, parameter: nn.Parameter, storage: Tensor) -> tuple[Tensor, int]:
        """This rank's part of a matrix, as a view into a tensor that is laid out like its flat one,
        and where it begins in the flattened matrix."""
        if self._sharded is None:
            return storage.view(-1), 0
        fragment = self._sharded.fragment(parameter, storage)
        return (storage.new_empty(0), 0) if fragment is None else (fragment.values, fragment.start)

    def _shares(self, parameters: list[nn.Parameter]) -> list[int | None]:
        """Which rank orthogonalises each matrix, the largest first, to the rank that has least to
        do; None for every rank."""
        if not self._is_apart:
            return [None] * len(parameters)
        sizes = [_num_elements(parameter) * min(whole_shape(parameter)) for parameter in parameters]
        owners, loads = [0] * len(sizes), [0] * world_size()
        for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
            owners[index] = loads.index(min(loads))
            loads[owners[index]] += sizes[index]
        return owners

    def _sum(self, matrices: list[Tensor]) -> list[Tensor]:
        """The sum over the ranks, each element of which one rank alone has."""
        if not self._is_apart:
            return matrices
        joined = torch.cat([matrix.flatten() for matrix in matrices])
        dist.all_reduce(joined)
        parts = joined.split([matrix.numel() for matrix in matrices])
        return [part.view(like.shape) for part, like in zip(parts, matrices, strict=True)]


def orthogonal(matrix: Tensor) -> Tensor:
    """(M, N) in PRECISION -> the matrix with singular values of about 1."""
    return zeropower_via_newtonschulz(matrix, ITERATIONS, COEFFICIENTS, dtype=PRECISION)


def _num_elements(parameter: nn.Parameter) -> int:
    return whole_shape(parameter).numel()


def _zeros(parameter: nn.Parameter, device: torch.device) -> Tensor:
    return torch.zeros(whole_shape(parameter), dtype=PRECISION, device=device)
