"""GPUs that a plan may name: peak speed, memory and links from the vendor's data sheets."""

import difflib
from dataclasses import dataclass

from aclip.errors import ConfigError


@dataclass(frozen=True)
class Gpu:
    """A GPU, as its data sheet has it.

    Attributes:
        name: its name on the command line.
        bf16_flops: FLOPs a second of dense matrix products in bf16, at their peak.
        fp32_flops: the same in fp32, without TF32.
        memory_bytes: its memory; a data sheet's gigabyte is 10^9 bytes.
        link_bytes: bytes a second that it can send to its neighbours in the node.
        memory_speed: bytes a second that its memory reads or writes, at its peak.
        host_link_bytes: bytes a second from the host's memory, PCIe x16.
    """

    name: str
    bf16_flops: float
    fp32_flops: float
    memory_bytes: float
    link_bytes: float
    memory_speed: float
    host_link_bytes: float


# Bytes a second and direction of a GPU's share of the network: 200 Gb/s, an adapter for each GPU.
NETWORK_BYTES = 25e9

# What well-tuned programs reach of the peaks on a data sheet: about 620 of an H100's 989 TFLOP/s in
# large matrix products, since its power is limited, and 2.8 of its 3.35 TB/s in copies.
MATRIX_SHARE, MEMORY_SHARE, HOST_LINK_SHARE = 0.63, 0.84, 0.8

# NVIDIA's data sheets: A10 (PCIe), A100 (SXM, 40 and 80 GB), L40S (PCIe), H100 (SXM), H200 (SXM),
# HGX B200 (an eighth of the board). Where a sheet gives speed with sparsity, half of it; where it
# gives a link's speed for both directions together, half of it.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a10", 125e12, 31.2e12, 24e9, 32e9, 600e9, 32e9),
        Gpu("a100-40", 312e12, 19.5e12, 40e9, 300e9, 1555e9, 32e9),
        Gpu("a100-80", 312e12, 19.5e12, 80e9, 300e9, 2039e9, 32e9),
        Gpu("l40s", 362e12, 91.6e12, 48e9, 32e9, 864e9, 32e9),
        Gpu("h100", 989.5e12, 67e12, 80e9, 450e9, 3350e9, 64e9),
        Gpu("h200", 989.5e12, 67e12, 141e9, 450e9, 4800e9, 64e9),
        Gpu("b200", 2250e12, 75e12, 180e9, 900e9, 8000e9, 64e9),
    )
}

# What CUDA calls them. Boards with other clocks or memory under the same first name, such as "H100
# PCIe" and parts of a GPU (MIG), are not in the list above.
DEVICE_NAMES = {
    "NVIDIA A10": "a10",
    "NVIDIA A100-SXM4-40GB": "a100-40",
    "NVIDIA A100-SXM4-80GB": "a100-80",
    "NVIDIA L40S": "l40s",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
}


def gpu_of_device(device_name: str) -> Gpu | None:
    """The GPU that CUDA calls so; None for one that is not in the list."""
    name = DEVICE_NAMES.get(device_name)
    return None if name is None else GPUS[name]


def find_gpu(name: str) -> Gpu:
    """The GPU of that name.

    Raises:
        ConfigError: it is not in the list; names those that are.
    """
    if name in GPUS:
        return GPUS[name]
    nearest = difflib.get_close_matches(name, GPUS, n=1, cutoff=0.5)
    hint = f" (did you mean {nearest[0]}?)" if nearest else ""
    raise ConfigError(f"--gpu is {name}, which is not known{hint}; take one of {', '.join(GPUS)}")
