"""fp32 masters and Adam moments of the student as whole tensors, under every ZeRO stage.

Each rank owns a fragment of a parameter's master and moments: all of it without ZeRO, a slice of a
flat buffer under ZeRO-1/2, a partition under ZeRO-3. Everything here is built on `_fragment`, which
finds that slice; a checkpoint therefore holds plain whole tensors and loads into any stage and any
number of ranks. DeepSpeed's own accessors raise for some groups before the first step (0.19.8), so
the flat buffers are read directly.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from aclip.distributed import rank, world_size

MASTER = "master"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class Fragment:
    """A rank's part of one parameter's fp32 tensor.

    Attributes:
        values: 1-d view into the optimizer's storage, writable.
        start: index of its first element in the flattened parameter.
    """

    values: Tensor
    start: int


class ShardedState:
    """Reads and writes the fp32 state behind a DeepSpeed engine's parameters.

    Args:
        engine: from deepspeed.initialize, ZeRO stage 0 to 3; an Adam-type optimizer.
    """

    def __init__(self, engine):
        self._engine = engine
        self._stage = engine.zero_optimization_stage()
        self._parameters = dict(engine.module.named_parameters())

    def gather(self) -> Iterator[tuple[str, str, Tensor | None]]:
        """Yields (parameter name, kind, whole fp32 tensor on CPU) for master and moments.

        A collective: every rank iterates to the end. Only rank 0 gets the tensors, others None.
        Frozen parameters have a master only.
        """
        for name, parameter in self._parameters.items():
            kinds = (MASTER, *MOMENTS) if parameter.requires_grad else (MASTER,)
            for kind in kinds:
                whole = self._gather_one(parameter, kind)
                yield name, kind, whole.cpu() if rank() == 0 else None

    @torch.no_grad()
    def load(self, name: str, kind: str, whole: Tensor) -> None:
        """Writes this rank's part of a whole tensor; a master also reaches the model's weights."""
        parameter = self._parameters[name]
        if parameter.requires_grad:
            fragment = self._fragment(parameter, kind, create=True)
            if fragment is not None:
                end = fragment.start + fragment.values.numel()
                fragment.values.copy_(whole.flatten()[fragment.start : end])
        if kind == MASTER:
            self._write_weights(parameter, whole)

    def set_step(self, step: int) -> None:
        """Sets the number of updates that Adam's bias correction counts."""
        for state in self._optimizer_states().values():
            old = state.get("step")
            # torch keeps a tensor, DeepSpeed's CPU Adam an int.
            state["step"] = torch.full_like(old, step) if torch.is_tensor(old) else step

    @torch.no_grad()
    def clamp_max(self, name: str, ceiling: float) -> Tensor:
        """Clamps a parameter of one element from above, in the master too.

        Returns:
            (1,) fp32, the master's value on every rank. A collective when ZeRO is on.
        """
        parameter = self._parameters[name]
        value = torch.zeros(1, device=self._engine.device)
        fragment = self._fragment(parameter, MASTER)
        if fragment is not None and fragment.values.numel():
            fragment.values.clamp_(max=ceiling)
            value.copy_(fragment.values)
        if self._stage > 0 and world_size() > 1:
            dist.all_reduce(value)
        if self._stage == 3:
            parameter.ds_tensor.clamp_(max=ceiling)
        if parameter.numel():
            parameter.data.clamp_(max=ceiling)
        return value

    def _gather_one(self, parameter: nn.Parameter, kind: str) -> Tensor:
        if not parameter.requires_grad:
            with gathered([parameter]):
                return parameter.detach().float().clone()
        shape = getattr(parameter, "ds_shape", parameter.shape)
        whole = torch.zeros(shape.numel(), device=self._engine.device)
        fragment = self._fragment(parameter, kind)
        # Without ZeRO every rank holds the whole: one of them is enough.
        if fragment is not None and (self._stage > 0 or rank() == 0):
            whole[fragment.start : fragment.start + fragment.values.numel()] = fragment.values
        if self._stage > 0 and world_size() > 1:
            dist.all_reduce(whole)
        return whole.view(shape)

    def _fragment(
        self, parameter: nn.Parameter, kind: str, create: bool = False
    ) -> Fragment | None:
        """This rank's part of `kind`; None if it owns no element or there is no such moment yet."""
        if self._stage == 0:
            flat, offset, start, numel = parameter, 0, 0, parameter.numel()
        elif self._stage == 3:
            optimizer = self._engine.optimizer
            group, offset, numel = optimizer.grad_position[optimizer.get_param_id(parameter)]
            flat = optimizer.fp32_partitioned_groups_flat[group]
            start = parameter.ds_tensor.numel() * rank()
            # The last partition is padded with uninitialised values.
            numel = max(0, min(numel, parameter.ds_numel - start))
        else:
            mapping = parameter._hp_mapping
            if mapping is None:
                return None
            flat = self._engine.optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
            offset = mapping.hp_fragment_address.start
            numel = mapping.hp_fragment_address.numel
            start = mapping.lp_fragment_address.start
        storage = flat.data if kind == MASTER else self._moment(flat, kind, create)
        if storage is None:
            return None
        return Fragment(storage.view(-1).narrow(0, offset, numel), start)

    def _moment(self, flat: Tensor, kind: str, create: bool) -> Tensor | None:
        states = self._optimizer_states()
        if create and kind not in states.get(flat, {}):
            state = states.setdefault(flat, {})
            state.setdefault("step", self._new_step(flat))
            for moment in MOMENTS:
                state[moment] = torch.zeros_like(flat.data)
        return states.get(flat, {}).get(kind)

    def _new_step(self, flat: Tensor) -> Tensor | int:
        torch_adam = isinstance(self._base_optimizer(), torch.optim.Adam)
        # On the parameter's device, where the fused kernel wants it.
        return torch.zeros((), dtype=torch.float32, device=flat.device) if torch_adam else 0

    def _optimizer_states(self) -> dict:
        return self._base_optimizer().state

    def _base_optimizer(self) -> torch.optim.Optimizer:
        optimizer = self._engine.optimizer
        return optimizer.optimizer if self._stage > 0 else optimizer

    def _write_weights(self, parameter: nn.Parameter, whole: Tensor) -> None:
        if hasattr(parameter, "ds_tensor"):
            shard = parameter.ds_tensor
            start = shard.numel() * rank()
            part = whole.flatten()[start : start + shard.numel()]
            shard.view(-1)[: part.numel()].copy_(part)
        if parameter.numel() == whole.numel():
            parameter.data.copy_(whole)


def gathered(parameters: list[nn.Parameter]):
    """A context in which ZeRO-3's partitioned parameters are whole; free for any other."""
    partitioned = [p for p in parameters if hasattr(p, "ds_id")]
    if not partitioned:
        return nullcontext()
    # Imported here: the planner builds a teacher, which needs no DeepSpeed until this point.
    import deepspeed

    return deepspeed.zero.GatheredParameters(partitioned)
