"""The optimizer and its parameter groups. The planner and the benchmarks need the groups alone, so
DeepSpeed is imported where it is used."""

import os
import sys
from pathlib import Path

import torch
from torch import nn

from aclip.config.ds_config import DsConfig
from aclip.config.sections import OptimizerConfig
from aclip.models.student import Student

ADAM = "Adam"
MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's tensors of a parameter's shape, in fp32."""


def optimizer_bytes(num_trained: int, dtype: torch.dtype) -> int:
    """Bytes of AdamW's state: its moments, and fp32 masters where the weights are not fp32.

    Args:
        num_trained: elements of the trainable parameters.
        dtype: the weights' dtype.
    """
    num_tensors = len(MOMENTS) + (dtype != torch.float32)
    return num_tensors * torch.float32.itemsize * num_trained


def state_family(optimizer: torch.optim.Optimizer) -> str:
    """What optimizers that can continue from each other's state have in common: "Adam" for torch's
    and DeepSpeed's for the CPU, else the name of the class."""
    import deepspeed

    is_adam = isinstance(optimizer, (torch.optim.Adam, deepspeed.ops.adam.DeepSpeedCPUAdam))
    return ADAM if is_adam else type(optimizer).__name__


def parameter_groups(student: nn.Module, weight_decay: float) -> list[dict]:
    """Trainable parameters in two groups: with weight decay, and 1-d ones without."""
    trainable = [p for p in student.parameters() if p.requires_grad]
    decayed = [p for p in trainable if p.ndim > 1]
    rest = [p for p in trainable if p.ndim <= 1]
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]


def build_optimizer(student: Student, config: OptimizerConfig, ds_config: DsConfig):
    """AdamW over the student's parameter groups: torch's fused kernel, or DeepSpeed's for the CPU
    where a GPU's optimizer state lies there."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    groups = parameter_groups(student, config.weight_decay)
    settings = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    if ds_config.offloads_optimizer and get_accelerator().device_name() != "cpu":
        # DeepSpeed builds it with ninja, which lies beside Python and may not be on the path.
        os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return deepspeed.ops.adam.DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)
    return torch.optim.AdamW(groups, fused=True, **settings)
