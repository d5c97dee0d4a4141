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
    """

    name: str
    bf16_flops: float
    fp32_flops: float
    memory_bytes: float
    link_bytes: float


# Bytes a second and direction of a GPU's share of the network: 200 Gb/s, an adapter for each GPU.
NETWORK_BYTES = 25e9

# NVIDIA's data sheets: A10 (PCIe), A100 (SXM, 40 and 80 GB), L40S (PCIe), H100 (SXM), H200 (SXM),
# HGX B200 (an eighth of the board). Where a sheet gives speed with sparsity, half of it; where it
# gives a link's speed for both directions together, half of it.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a10", 125e12, 31.2e12, 24e9, 32e9),
        Gpu("a100-40", 312e12, 19.5e12, 40e9, 300e9),
        Gpu("a100-80", 312e12, 19.5e12, 80e9, 300e9),
        Gpu("l40s", 362e12, 91.6e12, 48e9, 32e9),
        Gpu("h100", 989.5e12, 67e12, 80e9, 450e9),
        Gpu("h200", 989.5e12, 67e12, 141e9, 450e9),
        Gpu("b200", 2250e12, 75e12, 180e9, 900e9),
    )
}


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
