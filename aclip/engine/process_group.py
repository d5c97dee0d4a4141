"""The process group: this rank's device, timeouts of collectives."""

import datetime
import os
import warnings

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from aclip.distributed import port_in_use
from aclip.machine import own_device_index

COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=30)


def init_distributed(timeout: datetime.timedelta = COLLECTIVE_TIMEOUT) -> torch.device:
    """Joins the launcher's process group and returns this rank's device.

    Args:
        timeout: how long the rendezvous and each collective may take.

    Raises:
        PortInUse: on rank 0, if another process listens where the ranks are to meet.
    """
    avoid_shared_memory_build()
    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu":
        # Each batch has its own number of text tokens, which would scatter fixed segments.
        if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
            os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
        # Else this rank's first tensors would lie on the node's first device: the engine, which
        # chooses the device too, is built last.
        accelerator.set_device(own_device_index(accelerator.device_count()))
    # DeepSpeed 0.19.8 calls torch's collectives by names that torch 2.14 warns about at every call.
    warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning)
    try:
        deepspeed.init_distributed(
            accelerator.communication_backend_name(),
            auto_mpi_discovery=False,
            timeout=timeout,
            verbose=False,
        )
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise port_in_use() from None
    return torch.device(accelerator.current_device_name())


def limit_engine_collectives(timeout: datetime.timedelta) -> None:
    """Sets the timeout of the engine's collectives, whose process group DeepSpeed makes without
    that of init_distributed (0.19.8)."""
    group = deepspeed.utils.groups._get_data_parallel_group()
    dist.distributed_c10d._set_pg_timeout(timeout, group)


def background_group(device: torch.device) -> dist.ProcessGroup | None:
    """A group of all ranks for collectives in a thread, which must not use training's own group.

    A collective. None for one rank, and on GPUs, where no thread has anything to send.
    """
    if dist.get_world_size() == 1 or device.type == "cuda":
        return None
    return dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)


def avoid_shared_memory_build() -> None:
    """On CPU, DeepSpeed would compile a collective that training never calls and that leaks 69 MB
    of /dev/shm per rank and run (0.19.8)."""
    if get_accelerator().device_name() == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
