"""fp32 masters and the optimizer's state as whole tensors, under every ZeRO stage.

The optimizer keeps its state for flat tensors: for the parameters themselves without ZeRO, else for
this rank's part of each group's fp32 buffer. Everything here, and snapshot.py, is built on
`ShardedState.fragment`, which finds a parameter's slice in such a tensor; a checkpoint therefore
holds plain whole tensors and loads into any stage and any number of ranks. DeepSpeed's own
accessors raise for some groups before the first step (0.19.8), so the flat buffers are read
directly.
"""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from aclip.distributed import rank, world_size
from aclip.engine.optimizer import LAMB_FAMILY, state_family
from aclip.errors import ConfigError

MASTER = "master"
Scalar = Tensor | int | float


@dataclass
class Fragment:
    """A rank's part of one parameter's tensor.

    Attributes:
        values: 1-d view into the optimizer's storage, writable.
        start: index of its first element in the flattened parameter.
    """

    values: Tensor
    start: int


class ShardedState:
    """Reads and writes the state behind a DeepSpeed engine's parameters.

    What an optimizer of any class keeps for a parameter is a tensor of the parameter's shape, or a
    scalar (a number or a tensor of one element) that is the same for all parameters. What it has
    not made yet, before its first step, is not there and begins anew after loading.

    Args:
        engine: from deepspeed.initialize, ZeRO stage 0 to 3.

    Attributes:
        family: the optimizer's family, see state_family.
        stage: of ZeRO.
        device: this rank's.
        parameters: the model's, by name.
    """

    def __init__(self, engine):
        self._engine = engine
        self.device = engine.device
        self.stage = engine.zero_optimization_stage()
        self.parameters = dict(engine.module.named_parameters())
        self._optimizer = engine.optimizer.optimizer if self.stage > 0 else engine.optimizer
        self.family = state_family(self._optimizer)
        self._groups = {}
        if self.stage in (1, 2):
            groups = enumerate(engine.optimizer.bit16_groups)
            self._groups = {parameter: index for index, group in groups for parameter in group}

    def scalars(self) -> dict[str, Scalar]:
        """The optimizer's scalars by its own names, such as Adam's step; tensors are on the CPU.

        Raises:
            ConfigError: a scalar is not the same for all parameters.
        """
        found: dict[str, Scalar] = {}
        for name in self._trainable():
            for kind, value in self._split_state(name)[1].items():
                value = value.cpu() if torch.is_tensor(value) else value
                if bool(found.setdefault(kind, value) != value):
                    raise ConfigError(
                        f"{type(self._optimizer).__name__} keeps {kind} {value} for {name} and "
                        f"{found[kind]} for another parameter, which a checkpoint does not hold; "
                        "use an optimizer that counts alike for all"
                    )
        for group in self._optimizer.param_groups:
            if "step" in group:  # where timm's LAMB counts, alike for all groups
                found["step"] = group["step"]
        return found

    @torch.no_grad()
    def load(self, name: str, kind: str, whole: Tensor) -> None:
        """Writes this rank's part of a whole tensor; a master also reaches the model's weights."""
        parameter = self.parameters[name]
        if parameter.requires_grad:
            storage = flat = self.flat(parameter).data
            if kind != MASTER:
                state = self._optimizer.state[self.flat(parameter)]
                if state.get(kind) is None:
                    state[kind] = torch.zeros_like(flat, dtype=whole.dtype)
                storage = state[kind]
            fragment = self.fragment(parameter, storage)
            if fragment is not None:
                end = fragment.start + fragment.values.numel()
                fragment.values.copy_(whole.flatten()[fragment.start : end])
        if kind == MASTER:
            self._write_weights(parameter, whole)

    def load_scalars(self, scalars: dict[str, Scalar]) -> None:
        """Sets scalars for every parameter that has a state by now, or for all if none has."""
        if self.family == LAMB_FAMILY and "step" in scalars:
            for group in self._optimizer.param_groups:
                group["step"] = torch.as_tensor(scalars["step"]).cpu().clone()
            return
        flats = [self.flat(self.parameters[name]) for name in self._trainable()]
        states = self._optimizer.state
        for flat in [flat for flat in flats if states.get(flat)] or flats:
            for kind, value in scalars.items():
                states[flat][kind] = self._own_form(value, flat)

    @torch.no_grad()
    def clamp_max(self, name: str, ceiling: float) -> Tensor:
        """Clamps a parameter of one element from above, in the master too.

        Returns:
            (1,) fp32, the master's value on every rank. A collective when ZeRO is on.
        """
        parameter = self.parameters[name]
        value = torch.zeros(1, device=self.device)
        fragment = self.fragment(parameter, self.flat(parameter).data)
        if fragment is not None and fragment.values.numel():
            fragment.values.clamp_(max=ceiling)
            value.copy_(fragment.values)
        if self.stage > 0 and world_size() > 1:
            dist.all_reduce(value)
        if self.stage == 3:
            parameter.ds_tensor.clamp_(max=ceiling)
        if parameter.numel():
            parameter.data.clamp_(max=ceiling)
        return value

    def storages(self, name: str) -> dict[str, Tensor | None]:
        """The tensors, by kind, in which this rank's part of a parameter's state lies; None stands
        for a frozen parameter's master, which is the parameter.

        Raises:
            ConfigError: the optimizer keeps what is neither a tensor of the parameter's shape nor a
                scalar.
        """
        parameter = self.parameters[name]
        if not parameter.requires_grad:
            return {MASTER: None}
        return {MASTER: self.flat(parameter).data, **self._split_state(name)[0]}

    def orthogonal(self) -> set[str]:
        """The parameters that Muon orthogonalises, of which it keeps other tensors."""
        matrices = set(getattr(self._optimizer, "matrices", ()))
        return {name for name, parameter in self.parameters.items() if parameter in matrices}

    def _trainable(self) -> list[str]:
        return [name for name, p in self.parameters.items() if p.requires_grad]

    def _split_state(self, name: str) -> tuple[dict[str, Tensor], dict[str, Scalar]]:
        """The tensors laid out as the parameter's flat tensor, and the scalars beside them."""
        flat = self.flat(self.parameters[name])
        tensors, scalars = {}, {}
        for kind, value in self._optimizer.state.get(flat, {}).items():
            if torch.is_tensor(value) and value.shape == flat.shape:
                tensors[kind] = value
            elif _is_scalar(value):
                scalars[kind] = value
            elif value is not None:  # as SGD's momentum before the first step
                shape = f" of shape {list(value.shape)}" if torch.is_tensor(value) else ""
                raise ConfigError(
                    f"{type(self._optimizer).__name__} keeps {kind}, a {type(value).__name__}"
                    f"{shape}, for {name}, of which it sees a tensor of shape {list(flat.shape)}; "
                    "a checkpoint holds tensors of that shape and scalars only: use an optimizer "
                    "that keeps no others"
                )
        return tensors, scalars

    def _own_form(self, value: Scalar, flat: Tensor) -> Scalar:
        """A scalar in the type and on the device in which this optimizer keeps it for `flat`."""
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        if isinstance(self._optimizer, DeepSpeedCPUAdam):
            return int(value)  # it counts in an int where torch's Adam does in a tensor
        if isinstance(self._optimizer, torch.optim.Adam):
            value = torch.as_tensor(value, dtype=torch.float32)
        if not torch.is_tensor(value):
            return value
        # Where torch's own load_state_dict puts it.
        groups = self._optimizer.param_groups
        on_device = any(group.get("fused") or group.get("capturable") for group in groups)
        return value.to(flat.device if on_device else "cpu", copy=True)

    def flat(self, parameter: nn.Parameter) -> Tensor:
        """The tensor that the optimizer updates for a trainable parameter: itself, or this rank's
        part of the buffer that the parameter lies in. There is one on every rank, also where the
        rank owns no element of the parameter."""
        optimizer = self._engine.optimizer
        if self.stage == 0:
            return parameter
        if self.stage == 3:
            group, _, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
            return optimizer.fp32_partitioned_groups_flat[group]
        return optimizer.single_partition_of_fp32_groups[self._groups[parameter]]

    def fragment(self, parameter: nn.Parameter, storage: Tensor) -> Fragment | None:
        """This rank's part of a parameter in a tensor laid out as its flat one; None if it owns no
        element."""
        if self.stage == 0:
            offset, start, numel = 0, 0, parameter.numel()
        elif self.stage == 3:
            optimizer = self._engine.optimizer
            _, offset, numel = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = parameter.ds_tensor.numel() * rank()
            # The last partition is padded with uninitialised values.
            numel = max(0, min(numel, parameter.ds_numel - start))
        else:
            mapping = parameter._hp_mapping
            if mapping is None:
                return None
            offset = mapping.hp_fragment_address.start
            numel = mapping.hp_fragment_address.numel
            start = mapping.lp_fragment_address.start
        return Fragment(storage.view(-1).narrow(0, offset, numel), start)

    def _write_weights(self, parameter: nn.Parameter, whole: Tensor) -> None:
        if hasattr(parameter, "ds_tensor"):
            shard = parameter.ds_tensor
            start = shard.numel() * rank()
            part = whole.flatten()[start : start + shard.numel()]
            shard.view(-1)[: part.numel()].copy_(part)
        if parameter.numel() == whole.numel():
            parameter.data.copy_(whole)


def _is_scalar(value: object) -> bool:
    return value.numel() == 1 if torch.is_tensor(value) else isinstance(value, int | float)


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """A parameter's shape, also where ZeRO-3 has partitioned it."""
    return getattr(parameter, "ds_shape", parameter.shape)


def gathered(parameters: list[nn.Parameter]):
    """A context in which ZeRO-3's partitioned parameters are whole; free for any other."""
    partitioned = [p for p in parameters if hasattr(p, "ds_id")]
    if not partitioned:
        return nullcontext()
    # Imported here: the planner builds a teacher, which needs no DeepSpeed until this point.
    import deepspeed

    return deepspeed.zero.GatheredParameters(partitioned)
