"""Student to DeepSpeed engine: process group, parameter groups, optimizer."""

import datetime
import os
import sys
import warnings
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import nn

from aclip.config.ds_config import DsConfig
from aclip.config.recipe import OptimizerConfig
from aclip.engine import cpu_bf16
from aclip.errors import ConfigError
from aclip.models.student import Student

COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=30)


def init_distributed(timeout: datetime.timedelta = COLLECTIVE_TIMEOUT) -> torch.device:
    """Joins the launcher's process group and returns this rank's device.

    Args:
        timeout: of the rendezvous and of each collective.
    """
    _avoid_shared_memory_build()
    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu":
        # Else this rank's first tensors would lie on the node's first device: the engine, which
        # chooses the device too, is built last.
        accelerator.set_device(int(os.environ["LOCAL_RANK"]))
    # DeepSpeed 0.19.8 calls torch's collectives by names that torch 2.14 warns about at every call.
    warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning)
    deepspeed.init_distributed(
        accelerator.communication_backend_name(),
        auto_mpi_discovery=False,
        timeout=timeout,
        verbose=False,
    )
    return torch.device(accelerator.current_device_name())


def build_engine(student: Student, config: OptimizerConfig, ds_config: DsConfig):
    """Wraps the student in a DeepSpeed engine.

    Biases, norms, the logit scale and other 1-d parameters get no weight decay; frozen parameters
    are in no group.

    Raises:
        ConfigError: the student's blocks are compiled and the stage is 3.
    """
    if ds_config.stage == 3 and student.image.compiled:
        raise ConfigError(
            f"model.compile is true with zero_optimization.stage 3 in {ds_config.path}, whose "
            "gathering of weights torch.compile cannot trace; use stage 2 or model.compile=false"
        )
    _avoid_shared_memory_build()
    if ds_config.dtype == torch.bfloat16 and get_accelerator().device_name() == "cpu":
        cpu_bf16.use_fp32_products_if_faster()
    if ds_config.stage == 3:
        for parameter in student.external_parameters():
            deepspeed.zero.register_external_parameter(student, parameter)
    engine, *_ = deepspeed.initialize(
        model=student,
        optimizer=_build_optimizer(student, config, ds_config),
        config=ds_config.engine_values(),
    )
    if dist.get_world_size() == 1 and ds_config.stage == 0:
        # DeepSpeed copies all gradients into a buffer and back even to sum over one rank (0.19.8):
        # an eighth of a step on a CPU.
        engine.enable_backward_allreduce = False
    limit_engine_collectives(COLLECTIVE_TIMEOUT)
    return engine


def limit_engine_collectives(timeout: datetime.timedelta) -> None:
    """Sets the timeout of the engine's collectives, whose process group DeepSpeed makes without
    that of init_distributed (0.19.8)."""
    group = deepspeed.utils.groups._get_data_parallel_group()
    dist.distributed_c10d._set_pg_timeout(timeout, group)


def parameter_groups(student: nn.Module, weight_decay: float) -> list[dict]:
    """Trainable parameters in two groups: with weight decay, and 1-d ones without."""
    trainable = [p for p in student.parameters() if p.requires_grad]
    decayed = [p for p in trainable if p.ndim > 1]
    rest = [p for p in trainable if p.ndim <= 1]
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]


def _build_optimizer(student: Student, config: OptimizerConfig, ds_config: DsConfig):
    groups = parameter_groups(student, config.weight_decay)
    settings = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    if ds_config.offloads_optimizer and get_accelerator().device_name() != "cpu":
        # DeepSpeed builds it with ninja, which lies beside Python and may not be on the path.
        os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return deepspeed.ops.adam.DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)
    return torch.optim.AdamW(groups, fused=True, **settings)


def _avoid_shared_memory_build() -> None:
    """On CPU, DeepSpeed would compile a collective that training never calls and that leaks 69 MB
    of /dev/shm per rank and run (0.19.8)."""
    if get_accelerator().device_name() == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
