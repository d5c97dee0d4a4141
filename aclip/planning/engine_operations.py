"""What DeepSpeed runs in a step besides the model: gradients, the optimizer, and weights in bf16.

It does not run without values, so this is arithmetic from numbers of parameters (0.19.8). The test
tests/distributed/test_step_on_the_host.py counts what it really runs.
"""

import math

from aclip.planning.operations import Operation
from aclip.planning.trace_step import BACKWARD, UPDATE
from aclip.planning.zero_memory import FP32, FP64, ZeroSettings

ADAMW = 7 * FP32
"""Reads weight, gradient and both moments, writes all but the gradient."""
OF_MOMENT = 2 * FP32


def engine_operations(
    trained: list[int],
    settings: ZeroSettings,
    num_micro_steps: int = 1,
    num_groups: int = 2,
    num_moments: float = 2.0,
) -> list[Operation]:
    """The operations of a step on one rank; what collectives send is in zero_memory.sent_bytes.

    Gradients are copied into buckets in the backward pass, and a rank's part of them out of these.
    Stages 1 and 2 update one flat fp32 buffer for each of the parameter groups, stage 3 also
    takes the norm parameter by parameter. An offloaded optimizer's work on the host is not counted.

    Args:
        trained: elements of each trained parameter.
        settings: the ZeRO stage and what goes with it.
        num_micro_steps: backward passes of a step.
        num_groups: parameter groups.
        num_moments: that the optimizer keeps of an element, on average.
    """
    count, elements = len(trained), sum(trained)
    width, ranks = settings.dtype_bytes, settings.num_ranks
    part = math.ceil(elements / ranks)
    num_buckets = math.ceil(elements / settings.bucket_size)
    reduces = ranks > 1
    # ZeRO-1 reduces in a step's last backward pass only.
    passes = num_micro_steps if settings.stage >= 2 else 1

    def backward(name: str, number: int, num_bytes: int) -> list[Operation]:
        return _spread(name, BACKWARD, number, num_bytes, passes)

    def update(name: str, number: int, num_bytes: int) -> list[Operation]:
        return _spread(name, UPDATE, number, num_bytes, 1)

    norm = update("norm", 5 + reduces, part * width)
    moved = ADAMW - (2 - num_moments) * OF_MOMENT
    adamw = update("add to the count of steps", num_groups, 0)
    adamw += update("adamw", num_groups, round(part * moved))
    if settings.stage == 0:
        if not reduces:
            return norm + adamw
        joined = backward("join gradients", num_buckets, 2 * elements * width)
        reduced = backward("all-reduce", num_buckets, 0)
        return joined + reduced + backward("copy", count, 2 * elements * width) + norm + adamw
    operations = backward("copy to bucket", count, 2 * elements * width)
    operations += backward("join bucket", num_buckets, 2 * elements * width)
    operations += backward("reduce bucket", 2 * num_buckets * reduces, 2 * elements * width)
    to_fp32, to_weights = part * (width + FP32), part * (FP32 + width)
    if settings.stage == 3:
        operations += backward("cast", count, to_fp32) + backward("add", count, 2 * part * FP32)
        # Each pass gathers what is not kept whole; after the step the rest is gathered once.
        operations += backward("gather", count * reduces, 0)
        operations += update("norm", 2 * count + 50, part * (FP32 + 2 * FP64))
        operations += update("gather", count * reduces, 0)
        return operations + adamw + update("copy to weights", num_groups, to_weights)
    num_own = math.ceil(count / ranks)
    operations += backward("copy from bucket", num_own, 2 * part * width)
    if settings.stage == 2 and settings.accumulation_bytes > width:
        operations += backward("cast", num_own, to_fp32) + backward("add", num_own, 3 * part * FP32)
    operations += norm + update("join", num_groups, 2 * part * width)
    operations += update("cast", num_groups, to_fp32)
    operations += adamw + update("copy to weights", num_groups, to_weights)
    return operations + update("gather", 2 * reduces, 0)


def fused_adamw(trained: list[int], num_groups: int = 2) -> list[Operation]:
    """torch's fused AdamW on fp32 weights, with nothing around it."""
    steps = Operation("add to the count of steps", UPDATE, times=num_groups)
    return [steps, *_spread("adamw", UPDATE, num_groups, sum(trained) * ADAMW, 1)]


def _spread(name: str, part: str, number: int, num_bytes: int, passes: int) -> list[Operation]:
    """So many equal operations in each pass, which together move so many bytes a pass."""
    if not number:
        return []
    return [Operation(name, part, moved=num_bytes // number, times=number * passes)]
