"""What DeepSpeed's ZeRO stages hold per GPU and send per step, as plain numbers (0.19.8).

tests/distributed/test_planner_memory.py compares the bytes with what DeepSpeed allocates.
"""

import math
from dataclasses import dataclass, replace

from aclip.config.ds_config import DsConfig
from aclip.errors import ConfigError

FP32, FP64 = 4, 8
NUM_MOMENTS = 2  # Adam's


@dataclass(frozen=True)
class ZeroSettings:
    """What a ds_config says about the memory that a run needs.

    Attributes:
        stage: the ZeRO stage.
        num_ranks: how many ranks share the states.
        dtype_bytes: bytes of a weight.
        accumulation_bytes: bytes of an accumulated gradient.
        offload: whether the optimizer's state lives in the host's memory.
        persistence_threshold: ZeRO-3 keeps a parameter of up to so many elements whole.
        bucket_size: elements of a reduction bucket.
        overlap: whether there are two buckets instead of one.
        max_live: elements that ZeRO-3 gathers at a time, at most.
        on_host: whether the ranks run on CPUs, where gloo reduce-scatters a copy of the gradients.
    """

    stage: int
    num_ranks: int
    dtype_bytes: int
    accumulation_bytes: int
    offload: bool = False
    persistence_threshold: int = 100_000
    bucket_size: int = 500_000_000
    overlap: bool = False
    max_live: int = 1_000_000_000
    on_host: bool = False

    @property
    def title(self) -> str:
        if self.stage == 0:
            return "0 (fp32)"
        return f"{self.stage}_offload" if self.offload else str(self.stage)


@dataclass(frozen=True)
class States:
    """What a rank holds, in bytes.

    Attributes:
        parameters: weights as they rest between two steps.
        gradients: gradients as they rest between the backward pass and the optimizer's step.
        optimizer: fp32 masters, where they are apart from the weights, and moments.
        buffers: what only the backward pass holds: reduction buckets and copies of them, the
            weights that ZeRO-3 gathers.
        arriving: gradients that wait to be reduced, in the backward pass only: the largest one, or
            with ZeRO-1 all of them at its end.
        largest: the largest gradient alone.
        in_step: what only the optimizer's step holds: its largest gradient in fp64, for the norm.
        host: what lies in the host's memory instead.
    """

    parameters: float
    gradients: float
    optimizer: float
    buffers: float
    arriving: float = 0.0
    largest: float = 0.0
    in_step: float = 0.0
    host: float = 0.0

    def peak(self, activations: float, num_micro_steps: int) -> float:
        """The most that a rank holds at a time, on the GPU.

        Args:
            activations: bytes that a micro-batch keeps. They are freed while gradients arrive. With
                several micro_steps, each pass but the first finds gradients of the pass before.
        """
        if num_micro_steps == 1:
            passing = max(activations + self.largest, self.arriving)
        else:
            passing = activations + self.arriving
        resting = self.parameters + self.gradients + self.optimizer
        return resting + max(self.buffers + passing, self.in_step)


def zero_states(
    groups: list[list[int]],
    frozen: list[int],
    settings: ZeroSettings,
    num_moments: list[int] | None = None,
) -> States:
    """The parameters' states under a ZeRO stage, on the rank that holds most.

    Args:
        groups: elements of each trained parameter, by parameter group, in the optimizer's order.
        frozen: elements of each parameter without gradient.
        num_moments: tensors that the optimizer keeps for each group; None for Adam's two.
    """
    moments = [FP32 * number for number in num_moments or [NUM_MOMENTS] * len(groups)]
    if settings.stage == 0:
        trained = sum(map(sum, groups))
        weights = (trained + sum(frozen)) * settings.dtype_bytes
        kept = sum(sum(group) * each for group, each in zip(groups, moments, strict=True))
        return States(weights, trained * settings.dtype_bytes, kept, buffers=0.0)
    split = _partitioned if settings.stage == 3 else _flat
    parameters, gradients, shards, buffers = split(groups, frozen, settings)
    shard = sum(shards)
    optimizer = sum(own * (FP32 + each) for own, each in zip(shards, moments, strict=True))
    trained = [numel for group in groups for numel in group]
    largest = max(trained) * settings.dtype_bytes
    # ZeRO-1 reduces in a step's last backward pass only; until then whole gradients add up.
    arriving = sum(trained) * settings.dtype_bytes if settings.stage == 1 else largest
    if not settings.offload:
        in_step = min(max(trained), math.ceil(sum(trained) / settings.num_ranks)) * FP64
        return States(parameters, gradients, optimizer, buffers, arriving, largest, in_step)
    # Gradients go to the host in both forms; ZeRO-1/2 also stage the new weights there.
    in_host = FP32 + (settings.accumulation_bytes if settings.stage == 3 else settings.dtype_bytes)
    host = optimizer + shard * in_host
    return States(parameters, 0.0, 0.0, buffers, arriving, largest, host=host)


def _flat(groups: list[list[int]], frozen: list[int], settings: ZeroSettings):
    """ZeRO-1/2: each group is one flat buffer, padded to two elements a rank and cut into equal
    parts."""
    ranks, width = settings.num_ranks, settings.dtype_bytes
    padded = [math.ceil(sum(group) / (2 * ranks)) * 2 * ranks for group in groups]
    shards = [size // ranks for size in padded]
    if settings.stage == 2 and settings.accumulation_bytes > width:
        gradients = sum(shards) * settings.accumulation_bytes
    else:
        # Whole gradients of every parameter that a rank owns a part of.
        gradients = width * max(
            sum(
                _touched(group, rank * size // ranks, (rank + 1) * size // ranks)
                for group, size in zip(groups, padded, strict=True)
            )
            for rank in range(ranks)
        )
    buffers = settings.bucket_size * width * (2 if settings.overlap else 1)
    return (sum(padded) + sum(frozen)) * width, gradients, shards, buffers


def _partitioned(groups: list[list[int]], frozen: list[int], settings: ZeroSettings):
    """ZeRO-3: each parameter is cut into equal parts; small ones are kept whole beside them."""
    ranks, width = settings.num_ranks, settings.dtype_bytes
    numels = [*(numel for group in groups for numel in group), *frozen]
    shards = [sum(math.ceil(numel / ranks) for numel in group) for group in groups]
    parts = sum(shards) + sum(math.ceil(numel / ranks) for numel in frozen)
    whole = gathered = 0
    if ranks > 1:  # a single rank's part is the parameter
        whole = sum(numel for numel in numels if numel <= settings.persistence_threshold)
        gathered = min(settings.max_live, sum(numels) - whole)
    gradients = sum(shards) * settings.accumulation_bytes
    trained = [numel for group in groups for numel in group]
    # A bucket's gradients are joined in a copy; one that is larger than a bucket is not.
    joined = min(settings.bucket_size, sum(trained))
    copied = max(joined, *trained) if settings.on_host else 0
    buffers = (settings.bucket_size + joined + copied + gathered) * width
    return (parts + whole) * width, gradients, shards, buffers


def _touched(numels: list[int], start: int, end: int) -> int:
    """Elements of those parameters, laid end to end, of which a part lies in [start, end)."""
    total = offset = 0
    for numel in numels:
        if offset < end and offset + numel > start:
            total += numel
        offset += numel
    return total


def zero_settings(ds_config: DsConfig, num_ranks: int) -> ZeroSettings:
    """The settings of a checked ds_config; a key that is not set has DeepSpeed 0.19.8's default.

    Raises:
        ConfigError: it offloads parameters, which is not counted here.
    """
    zero = ds_config.values.get("zero_optimization", {})
    if zero.get("offload_param", {}).get("device", "none") != "none":
        raise ConfigError(
            f"zero_optimization.offload_param is set in {ds_config.path}, which a plan does not "
            "count; remove it for planning"
        )
    defaults = ZeroSettings(ds_config.stage, num_ranks, ds_config.dtype.itemsize, 0)
    return replace(
        defaults,
        accumulation_bytes=FP32 if ds_config.adds_up_in_fp32 else ds_config.dtype.itemsize,
        offload=ds_config.offloads_optimizer,
        persistence_threshold=int(
            zero.get("stage3_param_persistence_threshold", defaults.persistence_threshold)
        ),
        bucket_size=int(zero.get("reduce_bucket_size", defaults.bucket_size)),
        overlap=zero.get("overlap_comm", ds_config.stage == 3),
        max_live=int(zero.get("stage3_max_live_parameters", defaults.max_live)),
    )


def all_stages(own: ZeroSettings) -> list[ZeroSettings]:
    """The ds_config's own settings, and those of the other stages with the rest unchanged.

    Without ZeRO aclip trains in fp32 only, and gradients add up in the compute dtype below stage 2,
    as in the files of ds_configs/; from there on in fp32.
    """
    plain = replace(own, offload=False)
    stages = [
        replace(plain, stage=0, dtype_bytes=FP32, accumulation_bytes=FP32),
        replace(plain, stage=1, accumulation_bytes=own.dtype_bytes),
        replace(plain, stage=2, accumulation_bytes=FP32),
        replace(plain, stage=3, accumulation_bytes=FP32),
        replace(plain, stage=3, accumulation_bytes=FP32, offload=True),
    ]
    by_title = {stage.title: stage for stage in stages} | {own.title: own}
    return list(by_title.values())


def sent_bytes(
    groups: list[list[int]],
    frozen: list[int],
    settings: ZeroSettings,
    num_micro_steps: int,
    updates_teacher: bool,
) -> float:
    """Bytes of weights and gradients that a GPU sends in a step, with ring collectives.

    DeepSpeed all-reduces gradients up to stage 2 and reduce-scatters them at stage 3. Stages 2 and
    3 reduce in each backward pass. For stage 3 this is the most that it can send: every pass and
    the teacher's update gather all weights that are not kept whole.
    """
    trained = sum(map(sum, groups)) * settings.dtype_bytes
    if settings.stage == 3:
        numels = [*(numel for group in groups for numel in group), *frozen]
        cut = sum(n for n in numels if n > settings.persistence_threshold) * settings.dtype_bytes
        num_gathers = (2 * num_micro_steps - 1) + num_micro_steps + updates_teacher
        volume = num_micro_steps * trained + num_gathers * cut
    else:
        num_reductions = num_micro_steps if settings.stage == 2 else 1
        volume = 2 * num_reductions * trained + (trained if settings.stage else 0)
    return ring_share(settings.num_ranks) * volume


def ring_share(num_ranks: int) -> float:
    """Share of a tensor that each rank sends in a ring's gather or scatter."""
    return (num_ranks - 1) / num_ranks
