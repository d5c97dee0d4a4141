"""How long a step takes on a GPU, from its operations: the host's launches against the roofline.

On the device an operation takes as long as its matrix products or its bytes, whichever is longer,
at the share of the peaks that well-tuned programs reach; operations run one after another. The host
launches ahead of the device, so a step takes the longer of both sums. This is a prediction.
"""

from dataclasses import dataclass, fields

import torch

from aclip.config.recipe import Recipe
from aclip.data.synthetic import batch_of_mean_captions
from aclip.planning.engine_operations import engine_operations
from aclip.planning.gpus import HOST_LINK_SHARE, MATRIX_SHARE, MEMORY_SHARE, Gpu
from aclip.planning.operations import Operation
from aclip.planning.step_kinds import EPOCH_SAMPLES, step_kinds
from aclip.planning.trace_step import BACKWARD, COMPILED, PARTS, UPDATE, Trace, trace_step
from aclip.planning.zero_memory import ZeroSettings

# Seconds of one core of a server, +-40 %. This is the CPU time of towers and DeepSpeed with tensors
# of a few numbers, scaled from a core that takes 1.18 us for a torch.add to one that takes 1.05: 14
# to 27 us for an operation of a forward pass, its module's Python included; 7 to 9 us in a backward
# pass, which autograd runs without Python. A launch on a GPU takes about 2 us more.
LAUNCH = 2e-6
FORWARD_OPERATION, BACKWARD_OPERATION = 17e-6 + LAUNCH, 7e-6 + LAUNCH
# What Python costs for each trained parameter beside the operations, found in the same way on a
# ViT-B/16 with 362 of them: DeepSpeed's hook in the backward pass, and the loops around the
# optimizer's step; by ZeRO stage. torch's fused AdamW alone takes 3.7 us.
ENGINE_BACKWARD = {0: 0.0, 1: 42e-6, 2: 53e-6, 3: 140e-6}
ENGINE_UPDATE = {0: 12e-6, 1: 12e-6, 2: 12e-6, 3: 50e-6}
PLAIN_UPDATE = 3.7e-6


@dataclass(frozen=True)
class PartTime:
    """What a part of a step asks for, or of several kinds of step on average.

    Attributes:
        launches: operations that compute something, each at least one launch.
        host_seconds: what the host takes to launch them.
        moved: bytes read and written in the GPU's memory, and copied from the host.
        flops: of its matrix products.
        device_seconds: what the GPU takes to run them.
    """

    launches: float = 0
    host_seconds: float = 0.0
    moved: float = 0
    flops: float = 0
    device_seconds: float = 0.0

    def __add__(self, other: "PartTime") -> "PartTime":
        return PartTime(
            self.launches + other.launches,
            self.host_seconds + other.host_seconds,
            self.moved + other.moved,
            self.flops + other.flops,
            self.device_seconds + other.device_seconds,
        )

    def __mul__(self, share: float) -> "PartTime":
        return PartTime(*(share * getattr(self, each.name) for each in fields(self)))


@dataclass(frozen=True)
class StepTime:
    """A step on one GPU, by part, or the average over several kinds of step."""

    parts: dict[str, PartTime]
    seconds: float
    """The longer of host and device; of several kinds the average of what is the longer in each."""

    @property
    def whole(self) -> PartTime:
        return sum(self.parts.values(), PartTime())

    @property
    def is_host_bound(self) -> bool:
        """Whether the device would wait for the host."""
        return self.whole.host_seconds > self.whole.device_seconds


def step_time(
    operations: list[Operation],
    gpu: Gpu,
    num_parameters: int,
    stage: int | None,
    compiled: bool = False,
    num_micro_steps: int = 1,
) -> StepTime:
    """Adds up a step's operations.

    Args:
        operations: all of them, the engine's included.
        gpu: what runs them.
        num_parameters: trained tensors.
        stage: the ZeRO stage; None for torch's optimizer without DeepSpeed.
        compiled: no module's Python runs between the operations of a forward pass.
        num_micro_steps: how often DeepSpeed's hooks run.
    """
    parts = {name: PartTime() for name in PARTS}
    for each in operations:
        is_plain = compiled or each.part in (BACKWARD, UPDATE)
        host = BACKWARD_OPERATION if is_plain else FORWARD_OPERATION
        parts[each.part] += PartTime(
            each.times,
            each.times * host,
            each.times * (each.moved + each.from_host),
            each.times * each.flops,
            each.times * device_seconds(each, gpu),
        )
    of_hooks = 0.0 if stage is None else ENGINE_BACKWARD[stage] * num_micro_steps
    of_update = PLAIN_UPDATE if stage is None else ENGINE_UPDATE[stage]
    parts[BACKWARD] += PartTime(host_seconds=num_parameters * of_hooks)
    parts[UPDATE] += PartTime(host_seconds=num_parameters * of_update)
    whole = sum(parts.values(), PartTime())
    return StepTime(parts, max(whole.host_seconds, whole.device_seconds))


def average_time(times: list[tuple[float, StepTime]]) -> StepTime:
    """The average over kinds of step, each with its share of the steps."""
    parts = {
        name: sum((time.parts[name] * share for share, time in times), PartTime()) for name in PARTS
    }
    return StepTime(parts, sum(share * time.seconds for share, time in times))


def recipe_step_times(
    recipe: Recipe,
    dtype: torch.dtype,
    settings: ZeroSettings,
    gpu: Gpu,
    micro_batch_size: int,
    caption_tokens: float,
    num_samples: float = EPOCH_SAMPLES,
) -> tuple[StepTime, StepTime]:
    """A rank's average step of a run, without and with `model.compile`, without communication.

    Args:
        dtype: the dtype of the towers.
        settings: the ZeRO stage and the number of ranks.
        caption_tokens: the captions' mean length in a step, which pads them to
            recipe.caption_tokens.
        num_samples: samples of an epoch.
    """
    local_batch_size = recipe.train.global_batch_size // settings.num_ranks
    num_micro_steps = local_batch_size // micro_batch_size
    columns = recipe.caption_tokens
    batch = batch_of_mean_captions(recipe, caption_tokens, columns, micro_batch_size)
    kinds = step_kinds(recipe, batch, num_samples)
    traces = [
        trace_step(recipe, k.batch, settings.num_ranks, num_micro_steps, dtype, k.progress)
        for k in kinds
    ]

    def time(trace: Trace, parts: set[str]) -> StepTime:
        elements = sum(trace.trained)
        kept = zip(trace.groups, trace.num_moments, strict=True)
        engine = engine_operations(
            trace.trained,
            settings,
            num_micro_steps,
            num_groups=len(trace.groups),
            num_moments=sum(sum(group) * number for group, number in kept) / elements,
        )
        return step_time(
            trace.compiled(parts) + engine,
            gpu,
            len(trace.trained),
            settings.stage,
            bool(parts),
            num_micro_steps,
        )

    def average(parts: set[str]) -> StepTime:
        times = [(k.share, time(t, parts)) for k, t in zip(kinds, traces, strict=True)]
        return average_time(times)

    return average(set()), average(COMPILED)


def device_seconds(operation: Operation, gpu: Gpu) -> float:
    """The longer of an operation's bytes and its matrix products. Other arithmetic is left out:
    at an operation or two for each number read it never takes as long as the reading."""
    peak = gpu.bf16_flops if operation.in_bf16 else gpu.fp32_flops
    return max(
        operation.moved / (MEMORY_SHARE * gpu.memory_speed),
        operation.from_host / (HOST_LINK_SHARE * gpu.host_link_bytes),
        operation.flops / (MATRIX_SHARE * peak),
    )
