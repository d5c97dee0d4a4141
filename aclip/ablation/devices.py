"""Which device each run of an ablation gets."""

import os

from aclip.errors import ConfigError
from aclip.machine import usable_cores
from aclip.nodes.probe import BUSY_MIB, gpus
from aclip.nodes.start_ranks import VISIBLE, visible_devices


def choose_devices(num_processes: int | None, num_runs: int) -> list[dict[str, str]]:
    """Environment variables that give a process its device: a free GPU, or a share of the cores
    where there is no GPU or CUDA_VISIBLE_DEVICES hides all of them.

    Args:
        num_processes: how many run at a time; None for as many as there are free devices.

    Raises:
        ConfigError: every GPU is in use, or nvidia-smi, which knows that, is not there.
    """
    listed, shown = gpus(), visible_devices(os.environ.get(VISIBLE))
    if not listed or shown == []:
        import torch

        if torch.cuda.is_available():
            raise ConfigError("nvidia-smi is not in PATH, so that no free GPU is known; add it")
        num_cores = usable_cores()
        num_processes = num_processes or min(num_cores, num_runs)
        threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, num_cores // num_processes))
        return [{"OMP_NUM_THREADS": threads}] * num_processes
    allowed = [str(index) for index in range(len(listed))] if shown is None else shown
    # A GPU that is given by its UUID is taken as free.
    busy = {str(index) for index, gpu in enumerate(listed) if gpu["used"] > BUSY_MIB}
    free = [name for name in allowed if name not in busy]
    if not free:
        raise ConfigError(
            f"each of {len(allowed)} GPUs has more than {BUSY_MIB} MiB in use; end what runs there"
        )
    order = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}  # the order in which nvidia-smi counts
    return [order | {VISIBLE: name} for name in free[:num_processes]]
