"""The DeepSpeed engine around a student."""

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from aclip.config.ds_config import DsConfig
from aclip.config.optimizer import ADAMW, OptimizerConfig, check_with_ds_config
from aclip.engine import cpu_bf16
from aclip.engine.muon import Muon
from aclip.engine.optimizer import build_optimizer
from aclip.engine.process_group import (
    COLLECTIVE_TIMEOUT,
    avoid_shared_memory_build,
    limit_engine_collectives,
)
from aclip.engine.sharded_state import ShardedState
from aclip.errors import ConfigError
from aclip.models.student import Student


def build_engine(student: Student, config: OptimizerConfig, ds_config: DsConfig):
    """Wraps the student in a DeepSpeed engine.

    Biases, norms, the logit scale and other 1-d parameters get no weight decay; frozen parameters
    are in no group.

    Raises:
        ConfigError: the student's blocks are compiled and the stage is 3, or the optimizer can't
            run as the ds_config says.
    """
    check_with_ds_config(config, ds_config)
    if ds_config.stage == 3 and student.image.compiled:
        raise ConfigError(
            f"model.compile is true with zero_optimization.stage 3 in {ds_config.path}, whose "
            "gathering of weights torch.compile cannot trace; use stage 2 or model.compile=false"
        )
    avoid_shared_memory_build()
    if ds_config.dtype == torch.bfloat16 and get_accelerator().device_name() == "cpu":
        cpu_bf16.use_fp32_products_if_faster()
    if ds_config.stage == 3:
        for parameter in student.external_parameters():
            deepspeed.zero.register_external_parameter(student, parameter)
    values = ds_config.engine_values()
    if config.name != ADAMW:
        values["zero_allow_untested_optimizer"] = True  # check_with_ds_config knows them
    optimizer = build_optimizer(student, config, ds_config)
    engine, *_ = deepspeed.initialize(model=student, optimizer=optimizer, config=values)
    if isinstance(optimizer, Muon) and ds_config.stage > 0:
        optimizer.put_together_from(ShardedState(engine))
    if dist.get_world_size() == 1 and ds_config.stage == 0:
        # DeepSpeed copies all gradients into a buffer and back even to sum over one rank (0.19.8):
        # an eighth of a step on a CPU.
        engine.enable_backward_allreduce = False
    if ds_config.stage in (1, 2) and not get_accelerator().resolves_data_dependency():
        _wait_on_the_device(engine.optimizer)
    limit_engine_collectives(COLLECTIVE_TIMEOUT)
    return engine


def _wait_on_the_device(optimizer) -> None:
    """At the end of a backward pass lets the device wait for the reductions instead of the host.

    With overlap_comm DeepSpeed stops the host there until the device has done all its work
    (0.19.8), and the optimizer's step is then launched on an idle device. What follows runs on the
    current stream, so it is enough that this stream waits for the one with the reductions.
    """
    epilogue = optimizer.independent_gradient_partition_epilogue
    accelerator = get_accelerator()

    def wait() -> None:
        accelerator.current_stream().wait_stream(optimizer.reduction_stream)

    def run() -> None:
        accelerator.synchronize = wait
        try:
            epilogue()
        finally:
            del accelerator.synchronize

    optimizer.independent_gradient_partition_epilogue = run
