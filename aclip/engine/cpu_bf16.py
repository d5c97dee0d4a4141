"""bf16 matrix products and attention on CPUs that have no bf16 instructions.

There, torch falls back to scalar loops that are 10 to 30 times slower than fp32. Computing a
product in fp32 and rounding once gives the same result up to the order of summation.
"""

from pathlib import Path

import torch

BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16")
ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", ATTENTION, f"{ATTENTION}_backward")

_library: torch.library.Library | None = None


def use_fp32_products_if_faster() -> bool:
    """Routes bf16 products on CPU through fp32 for this process; does nothing on a CPU with bf16.

    Returns:
        Whether products are routed.
    """
    global _library
    if _has_bf16_instructions():
        return False
    if _library is None:
        _library = torch.library.Library("aten", "IMPL")
        for name in PRODUCTS:
            _library.impl(name, _routed(name), "CPU", with_keyset=True, allow_override=True)
    return True


def _routed(name: str):
    original = torch.library.get_kernel(f"aten::{name}", "CPU")

    def product(dispatch_keys, *args, **kwargs):
        if args[0].dtype != torch.bfloat16:
            return original.call_boxed(dispatch_keys, *args, **kwargs)
        wide = [arg.float() if torch.is_tensor(arg) else arg for arg in args]
        named = {
            key: arg.float() if torch.is_tensor(arg) and arg.dtype == torch.bfloat16 else arg
            for key, arg in kwargs.items()
        }
        result = original.call_boxed(dispatch_keys, *wide, **named)
        if torch.is_tensor(result):
            return result.to(torch.bfloat16)
        if name == ATTENTION:
            # The second output is the log-sum-exp, fp32 in every precision.
            return result[0].to(torch.bfloat16), result[1]
        return tuple(part.to(torch.bfloat16) for part in result)

    return product


def _has_bf16_instructions() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return True
    flags = cpuinfo.read_text().split()
    return any(flag in flags for flag in BF16_INSTRUCTIONS)
