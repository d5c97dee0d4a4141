"""The optimizer and its parameter groups. The planner and the benchmarks need the groups alone, so
DeepSpeed is imported where it is used."""

import os
import sys
from pathlib import Path

import torch
from torch import nn

from aclip.config.ds_config import DsConfig
from aclip.config.optimizer import LAMB, LION, MUON, TOWERS, OptimizerConfig, TowerRates
from aclip.models.student import Student

ADAM, LAMB_FAMILY = "Adam", "Lamb"
MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's tensors of a parameter's shape, in fp32."""


def optimizer_bytes(num_trained: int, dtype: torch.dtype, num_moments: int = len(MOMENTS)) -> int:
    """Bytes of an optimizer's state: its moments, and fp32 masters where the weights are not fp32.

    Args:
        num_trained: elements of the trainable parameters.
        dtype: the weights' dtype.
        num_moments: tensors of a parameter's shape that the optimizer keeps.
    """
    num_tensors = num_moments + (dtype != torch.float32)
    return num_tensors * torch.float32.itemsize * num_trained


def state_family(optimizer: torch.optim.Optimizer) -> str:
    """What optimizers that can continue from each other's state have in common: "Adam" for torch's
    and DeepSpeed's for the CPU, else the name of the class."""
    import deepspeed

    from aclip.engine.muon import Muon

    is_adam = isinstance(optimizer, (torch.optim.Adam, deepspeed.ops.adam.DeepSpeedCPUAdam))
    return ADAM if is_adam and not isinstance(optimizer, Muon) else type(optimizer).__name__


def parameter_groups(student: nn.Module, weight_decay: float) -> list[dict]:
    """Trainable parameters in two groups: with weight decay, and 1-d ones without."""
    trainable = [p for p in student.parameters() if p.requires_grad]
    decayed = [p for p in trainable if p.ndim > 1]
    rest = [p for p in trainable if p.ndim <= 1]
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]


def student_groups(student: Student, config: OptimizerConfig) -> list[dict]:
    """The two groups, divided where parameters have other learning rates or another optimizer.

    Returns:
        Groups with `lr_scale`, the factor of the run's learning rate, `orthogonal`, whether they
        hold the matrices that Muon orthogonalises, and `num_moments`, the tensors of a parameter's
        shape that the optimizer keeps.
    """
    scales: dict[nn.Parameter, float] = {}
    matrices: set[nn.Parameter] = set()
    for name in TOWERS:
        tower = getattr(student, name)
        scales |= _scales(tower, getattr(config, name))
        if config.name == MUON:
            matrices |= {p for b in tower.blocks for p in b.parameters() if p.ndim == 2}
    divided = []
    for group in parameter_groups(student, config.weight_decay):
        parts: dict[tuple[bool, float], list[nn.Parameter]] = {}
        for parameter in group["params"]:
            key = (parameter in matrices, scales.get(parameter, 1.0))
            parts.setdefault(key, []).append(parameter)
        for (orthogonal, scale), parameters in parts.items():
            num_moments = 1 if orthogonal or config.name == LION else len(MOMENTS)
            own = {"lr_scale": scale, "orthogonal": orthogonal, "num_moments": num_moments}
            divided.append({**group, "params": parameters, **own})
    return divided


def _scales(tower: nn.Module, rates: TowerRates) -> dict[nn.Parameter, float]:
    """The factor of each parameter's learning rate, see TowerRates."""
    in_blocks = [set(block.parameters()) for block in tower.blocks]
    scales, depth, in_front = {}, len(in_blocks), True
    for parameter in tower.parameters():
        index = next((i for i, own in enumerate(in_blocks) if parameter in own), None)
        in_front = in_front and index is None
        # Modules are made in the order in which they run: embeddings, blocks, and the final norm.
        steps = depth - index if index is not None else (depth + 1 if in_front else 0)
        scales[parameter] = rates.lr_scale * rates.layer_decay**steps
    return scales


def build_optimizer(student: Student, config: OptimizerConfig, ds_config: DsConfig):
    """The recipe's optimizer over the student's parameter groups.

    AdamW is torch's fused kernel, or DeepSpeed's for the CPU where a GPU's optimizer state lies
    there; Lion and LAMB are timm's. Clipping is the ds_config's alone, so LAMB's own is off.
    """
    groups = student_groups(student, config)
    settings = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    if config.name == LION:
        from timm.optim import Lion

        return Lion(groups, lr=config.lr, betas=config.betas)
    if config.name == LAMB:
        from timm.optim import Lamb

        return Lamb(groups, max_grad_norm=None, **settings)
    if config.name == MUON:
        from aclip.engine.muon import Muon

        return Muon(groups, fused=True, **settings)
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    if ds_config.offloads_optimizer and get_accelerator().device_name() != "cpu":
        # DeepSpeed builds it with ninja, which lies beside Python and may not be on the path.
        os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return deepspeed.ops.adam.DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)
    return torch.optim.AdamW(groups, fused=True, **settings)
