"""Plans a run before it starts: memory per GPU, the largest micro-batch, time, communication.

A step is measured without values (measure_step.py), its time predicted (step_time.py), what ZeRO
holds is arithmetic (zero_memory.py), and this file puts them together; no GPU is needed. Not
counted: the time of an offloaded optimizer, the teacher's activations (one block's, without
gradient), the memory that torch.compile saves.
"""

from dataclasses import dataclass, replace

import torch

from aclip.config.ds_config import DsConfig
from aclip.config.geometry import teacher_grid
from aclip.config.optimizer import runs_under
from aclip.config.recipe import Recipe
from aclip.data.batch import Batch
from aclip.data.stored_scores import HEADER_BYTES, record_bytes
from aclip.data.synthetic import batch_of_mean_captions, mean_in_training
from aclip.planning.gpu_memory import Memory, MemoryRow
from aclip.planning.gpus import NETWORK_BYTES, Gpu
from aclip.planning.measure_step import Measured
from aclip.planning.plan_input import PlanInput
from aclip.planning.run_memory import batch_bytes
from aclip.planning.step_kinds import describe_keep_ratio, teaching_share
from aclip.planning.step_time import StepTime, recipe_step_times
from aclip.planning.workload import Workload, describe_workload
from aclip.planning.zero_memory import (
    FP32,
    ZeroSettings,
    all_stages,
    ring_share,
    sent_bytes,
    zero_settings,
    zero_states,
)

MUON_SENT_BYTES = 2 * 2 * 2
"""Bytes that Muon sends for each element of its matrices: two all-reduces in bf16, each of which
sends the element twice."""

# A run's share of a GPU; the rest is for CUDA's context, NCCL, work space and fragmentation.
USABLE_SHARE = 0.9


@dataclass(frozen=True)
class Plan:
    """The plan of a run; see plan_report.py for how it reads.

    Attributes:
        ds_config, gpu, workload: what the plan is made for.
        memory_bytes: the share of a GPU's memory that a run may use.
        rows: the memory under each ZeRO stage.
        own: the row of the ds_config's stage.
        micro_batch_size: the micro-batch that the times are for.
        time: the predicted time of a step, without communication.
        compiled: the same with compiled towers.
        stated_mfu: share of the GPU's peak FLOPs that takes the prediction's place.
        link_bytes: what a GPU can send in a second.
        sent_bytes: what it sends in a step.
        num_steps: the schedule's length.
        num_samples: the samples of an epoch.
        teaching_share: the share of the steps in which the teacher runs on its view. FLOPs and
            times are the average over all steps.
        kept_scores_bytes: the disk space that scores take which later epochs read.
        keep_ratio: how it changes, see describe_keep_ratio.
    """

    ds_config: DsConfig
    gpu: Gpu
    workload: Workload
    memory_bytes: float
    rows: list[MemoryRow]
    own: MemoryRow
    micro_batch_size: int
    time: StepTime
    compiled: bool
    stated_mfu: float | None
    link_bytes: float
    sent_bytes: float
    num_steps: int
    num_samples: int
    teaching_share: float
    kept_scores_bytes: int
    keep_ratio: str

    @property
    def measured(self) -> Measured:
        return self.workload.measured[self.ds_config.dtype.itemsize]

    @property
    def num_micro_steps(self) -> int:
        return self.workload.local_batch_size // self.micro_batch_size

    @property
    def repeated_flops(self) -> float:
        """FLOPs per sample on top of those that are needed once."""
        return self.measured.repeated_flops(self.num_micro_steps)

    @property
    def peak_seconds(self) -> float:
        """The time of a step's matrix products, each one needed once, at the GPU's peak."""
        in_bf16 = self.ds_config.dtype == torch.bfloat16
        peak = self.gpu.bf16_flops if in_bf16 else self.gpu.fp32_flops
        return self.workload.local_batch_size * self.measured.total_flops / peak

    @property
    def compute_seconds(self) -> float:
        """The time of a step without communication."""
        if self.stated_mfu is None:
            return self.time.seconds
        again = self.repeated_flops / self.measured.total_flops
        return self.peak_seconds * (1 + again) / self.stated_mfu

    @property
    def mfu(self) -> float:
        """Share of the peak that the FLOPs which are needed once reach in a step."""
        return self.peak_seconds / self.step_seconds

    @property
    def communication_seconds(self) -> float:
        return self.sent_bytes / self.link_bytes

    @property
    def step_seconds(self) -> float:
        """Arithmetic and communication overlap: the longer of both."""
        return max(self.compute_seconds, self.communication_seconds)

    @property
    def flops(self) -> float:
        """FLOPs of the run's matrix products that are needed once."""
        samples = self.num_steps * self.workload.global_batch_size
        return samples * self.measured.total_flops

    @property
    def gpu_hours(self) -> float:
        return self.num_steps * self.step_seconds * self.workload.num_ranks / 3600


def plan(given: PlanInput) -> Plan:
    """Plans what `launch/plan.py` was given."""
    arguments, gpu, recipe, ds_config = given.arguments, given.gpu, given.recipe, given.ds_config
    num_ranks, settings = given.num_ranks, given.settings
    length = mean_in_training(recipe, arguments.caption_tokens)
    batch = batch_of_mean_captions(recipe, length, recipe.caption_tokens)
    dtypes = {ds_config.dtype, torch.float32}
    workload = describe_workload(recipe, batch, num_ranks, dtypes, num_samples=arguments.samples)
    held = batch_bytes(recipe, batch, arguments.image_pixels)
    workload = replace(workload, batch_bytes=held)
    memory_bytes = USABLE_SHARE * gpu.memory_bytes
    rows = [
        memory_row(workload, each, memory_bytes)
        for each in all_stages(settings)
        if runs_under(recipe.optimizer, each.stage, each.offload)
    ]
    own = next(row for row in rows if row.title == settings.title)
    micro = min(ds_config.micro_batch_size, own.largest[None]) or ds_config.micro_batch_size
    num_micro_steps = workload.local_batch_size // micro
    sent = sent_bytes(
        workload.groups, workload.frozen, settings, num_micro_steps, bool(workload.teacher)
    )
    if settings.stage > 0:
        sent += ring_share(num_ranks) * MUON_SENT_BYTES * workload.orthogonal
    sent += ring_share(num_ranks) * workload.measured[settings.dtype_bytes].collectives
    eager, compiled = recipe_step_times(
        recipe, ds_config.dtype, settings, gpu, micro, length, arguments.samples
    )
    link = gpu.link_bytes if arguments.nodes == 1 else NETWORK_BYTES
    if arguments.bandwidth is not None:
        link = arguments.bandwidth * 1e9
    return Plan(
        ds_config=ds_config,
        gpu=gpu,
        workload=workload,
        memory_bytes=memory_bytes,
        rows=rows,
        own=own,
        micro_batch_size=micro,
        time=compiled if recipe.model.compile else eager,
        compiled=recipe.model.compile,
        stated_mfu=arguments.mfu,
        link_bytes=link,
        sent_bytes=sent,
        num_steps=recipe.num_steps(arguments.samples),
        num_samples=round(arguments.samples),
        teaching_share=teaching_share(recipe, arguments.samples),
        kept_scores_bytes=kept_scores_bytes(recipe, round(arguments.samples)),
        keep_ratio=describe_keep_ratio(recipe),
    )


def kept_scores_bytes(recipe: Recipe, num_samples: int) -> int:
    """The disk space that a run's kept scores take in its folder: those of the last epoch that made
    some, and of the one before, which the checkpoint before the last may need; 0 where none are."""
    if not recipe.keeps_scores:
        return 0
    return 2 * (HEADER_BYTES + num_samples * record_bytes(teacher_grid(recipe)))


def plan_memory(
    recipe: Recipe, ds_config: DsConfig, num_ranks: int, batch: Batch, on_host: bool
) -> float:
    """A rank's peak memory in bytes at the ds_config's micro-batch, as the recipe recomputes.

    Args:
        batch: a batch such as the rank reads; those ahead are not counted.
        on_host: the ranks run on CPUs.
    """
    settings = replace(zero_settings(ds_config, num_ranks), on_host=on_host)
    workload = describe_workload(recipe, batch, num_ranks, {ds_config.dtype}, modes=())
    kept = workload.measured[settings.dtype_bytes].encoding[None].kept
    return stage_memory(workload, settings).peak(ds_config.micro_batch_size, kept)


def memory_row(workload: Workload, settings: ZeroSettings, limit: float) -> MemoryRow:
    """The memory under one stage, and the largest micro-batches, which divide the local batch."""
    memory = stage_memory(workload, settings)
    encoding = workload.measured[settings.dtype_bytes].encoding
    kept = {mode: encoded.kept for mode, encoded in encoding.items()}
    largest = {mode: memory.largest_fitting(each, limit) for mode, each in kept.items()}
    return MemoryRow(settings.title, memory, kept, largest)


def stage_memory(workload: Workload, settings: ZeroSettings) -> Memory:
    """What a GPU holds under one stage besides activations."""
    width = settings.dtype_bytes
    measured = workload.measured[width]
    return Memory(
        states=zero_states(workload.groups, workload.frozen, settings, workload.num_moments),
        teacher=workload.teacher * (FP32 + (width if width < FP32 else 0)),
        heads=measured.heads,
        losses=measured.losses,
        batches=workload.batch_bytes * workload.local_batch_size,
        local_batch_size=workload.local_batch_size,
    )
