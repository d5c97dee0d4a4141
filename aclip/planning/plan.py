"""Plans a run before it starts: memory per GPU, the largest micro-batch, time, communication.

`plan_run` reads the recipe and the ds_config; everything below it takes plain numbers. No GPU is
needed, and the towers are built without weights. Not counted: the time of an offloaded optimizer on
the host, the teacher's activations (one block's, without gradient), and what torch.compile saves.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import get_args

import torch

from aclip.config.ds_config import DsConfig, read_ds_config
from aclip.config.recipe import Recipe
from aclip.config.recipe_file import load_recipe
from aclip.config.sections import Recompute
from aclip.engine.optimizer import parameter_groups
from aclip.errors import ConfigError
from aclip.method.losses import CHUNK_ROWS
from aclip.method.schedules import count_steps
from aclip.models.student import TRAINING_ONLY, Student, build_student
from aclip.planning.activation_memory import FP32, activations, local_activations, logits
from aclip.planning.flops import Flops, repeated_flops, step_flops
from aclip.planning.gpus import NETWORK_BYTES, Gpu, find_gpu
from aclip.planning.step_shape import StepShape, describe_step, with_recompute
from aclip.planning.zero_memory import (
    States,
    ZeroSettings,
    all_stages,
    ring_share,
    sent_bytes,
    zero_settings,
    zero_states,
)

# Of a GPU's memory; the rest is for CUDA's context, NCCL, work space and fragmentation.
USABLE_SHARE = 0.9
UNLIMITED = 2.0**60
MODES: tuple[Recompute, ...] = get_args(Recompute)


@dataclass(frozen=True)
class Run:
    """What is the same under every ZeRO stage.

    Attributes:
        groups, frozen: elements of the trained parameters by group, and of the others.
        teacher: elements of the EMA teacher.
        step: what a step runs per sample.
        num_ranks: GPUs. memory_bytes: that a GPU has for us.
    """

    groups: list[list[int]]
    frozen: list[int]
    teacher: int
    step: StepShape
    num_ranks: int
    memory_bytes: float

    @property
    def local_batch_size(self) -> int:
        return self.step.global_batch_size // self.num_ranks


@dataclass(frozen=True)
class MemoryRow:
    """A ZeRO stage's memory on one GPU, bytes.

    Attributes:
        title: the stage, and its precision where that is not the ds_config's.
        states: of the parameters. teacher: average and compute copy.
        local_batch_size: images of a step. heads, logits: of all of them.
        activations: of a sample of the micro-batch, by what the backward pass recomputes.
        micro_batches: the largest that fit, likewise; 0 for none.
        fitting: the largest with what the recipe itself recomputes.
    """

    title: str
    states: States
    teacher: float
    local_batch_size: int
    heads: float
    logits: float
    activations: dict[Recompute, float]
    micro_batches: dict[Recompute, int]
    fitting: int

    def total(self, micro_batch_size: int, recompute: Recompute) -> float:
        return self.at(micro_batch_size, self.activations[recompute])

    def at(self, micro_batch_size: int, kept: float) -> float:
        """The peak with `kept` bytes of activations a sample."""
        activations = micro_batch_size * kept + self.heads + self.logits
        num_micro_steps = self.local_batch_size // micro_batch_size
        return self.teacher + self.states.peak(activations, num_micro_steps)


@dataclass(frozen=True)
class Plan:
    """The plan of a run; see planner_report.py for how it reads.

    Attributes:
        ds_config: as read. gpu: as found. run: the same under every stage.
        flops: a sample's by component. repeated: a sample's on top, which run twice.
        rows: memory by stage. own: the row of the ds_config.
        micro_batch_size, num_micro_steps: that the times are for. mfu: share of the peak.
        link_bytes: that a GPU sends a second.
        compute_seconds, sent_bytes, communication_seconds: of a step.
        num_steps: of the schedule.
    """

    ds_config: DsConfig
    gpu: Gpu
    run: Run
    flops: dict[str, Flops]
    repeated: float
    rows: list[MemoryRow]
    own: MemoryRow
    micro_batch_size: int
    num_micro_steps: int
    mfu: float
    link_bytes: float
    compute_seconds: float
    sent_bytes: float
    communication_seconds: float
    num_steps: int

    @property
    def step_seconds(self) -> float:
        """Arithmetic and communication overlap: the longer of both."""
        return max(self.compute_seconds, self.communication_seconds)

    @property
    def gpu_hours(self) -> float:
        return self.num_steps * self.step_seconds * self.run.num_ranks / 3600


def plan_run(arguments: argparse.Namespace) -> Plan:
    """Plans what the parsed arguments of `launch/plan.py` describe."""
    _check_numbers(arguments)
    gpu = find_gpu(arguments.gpu)
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    num_ranks = arguments.nodes * arguments.gpus_per_node
    ds_config = read_ds_config(arguments.ds_config, recipe.train.global_batch_size, num_ranks)
    settings = zero_settings(ds_config, num_ranks)
    with torch.device("meta"):
        student = build_student(recipe)
    step = describe_step(recipe, student, arguments.caption_tokens)
    run = Run(
        *count_parameters(student, recipe.optimizer.weight_decay),
        _count_teacher(student) if recipe.needs_teacher else 0,
        step,
        num_ranks,
        USABLE_SHARE * gpu.memory_bytes,
    )
    rows = [memory_row(run, stage) for stage in all_stages(settings)]
    own = next(row for row in rows if row.title == settings.title)
    micro = min(ds_config.micro_batch_size, own.fitting) or ds_config.micro_batch_size
    num_micro_steps = run.local_batch_size // micro
    flops = step_flops(step)
    repeated = repeated_flops(step, num_micro_steps)
    per_gpu = run.local_batch_size * (sum(part.total for part in flops.values()) + repeated)
    peak = gpu.bf16_flops if ds_config.dtype == torch.bfloat16 else gpu.fp32_flops
    sent = sent_bytes(run.groups, run.frozen, settings, num_micro_steps, bool(run.teacher))
    sent += embedding_bytes(step, num_ranks)
    link = gpu.link_bytes if arguments.nodes == 1 else NETWORK_BYTES
    if arguments.bandwidth is not None:
        link = arguments.bandwidth * 1e9
    return Plan(
        ds_config,
        gpu,
        run,
        flops,
        repeated,
        rows,
        own,
        micro,
        num_micro_steps,
        arguments.mfu,
        link,
        compute_seconds=per_gpu / (arguments.mfu * peak),
        sent_bytes=sent,
        communication_seconds=sent / link,
        num_steps=count_steps(recipe.train.epochs, arguments.samples, step.global_batch_size),
    )


def plan_memory(
    recipe: Recipe,
    ds_config: DsConfig,
    num_ranks: int,
    caption_tokens: float,
    longest_caption: float,
    on_host: bool,
) -> float:
    """Bytes of a rank at the ds_config's micro-batch, with what the recipe recomputes.

    Args:
        caption_tokens, longest_caption: of a batch, the mean and the most.
        on_host: ranks on CPUs.
    """
    with torch.device("meta"):
        student = build_student(recipe)
    step = describe_step(recipe, student, caption_tokens, longest_caption)
    teacher = _count_teacher(student) if recipe.needs_teacher else 0
    counts = count_parameters(student, recipe.optimizer.weight_decay)
    run = Run(*counts, teacher, step, num_ranks, memory_bytes=UNLIMITED)
    settings = replace(zero_settings(ds_config, num_ranks), on_host=on_host)
    kept = activations(step, settings.dtype_bytes)
    return memory_row(run, settings).at(ds_config.micro_batch_size, kept)


def memory_row(run: Run, settings: ZeroSettings) -> MemoryRow:
    """The memory under one stage, and the largest micro-batches, which divide the local batch."""
    width, local = settings.dtype_bytes, run.local_batch_size
    states = zero_states(run.groups, run.frozen, settings)
    teacher = run.teacher * (FP32 + (width if width < FP32 else 0))
    heads = local * local_activations(run.step, width)
    of_logits = logits(run.step, local, CHUNK_ROWS)
    each = {mode: activations(with_recompute(run.step, mode), width) for mode in MODES}
    row = MemoryRow(settings.title, states, teacher, local, heads, of_logits, each, {}, 0)

    def largest(kept: float) -> int:
        return largest_divisor(local, lambda micro: row.at(micro, kept) <= run.memory_bytes)

    micro_batches = {mode: largest(kept) for mode, kept in each.items()}
    fitting = largest(activations(run.step, width))
    return replace(row, micro_batches=micro_batches, fitting=fitting)


def largest_divisor(number: int, fits: Callable[[int], bool]) -> int:
    """The largest divisor of `number` that fits; 0 if there is none."""
    divisors = (n for n in range(number, 0, -1) if number % n == 0)
    return next((n for n in divisors if fits(n)), 0)


def embedding_bytes(step: StepShape, num_ranks: int) -> float:
    """Bytes that a GPU sends for the losses: fp32 embeddings gathered, gradients all-reduced."""
    embeddings = (step.num_views + 1) * step.embed_dim + 2 * (step.simclr_dim or 0)
    return ring_share(num_ranks) * 3 * FP32 * step.global_batch_size * embeddings


def count_parameters(student: Student, weight_decay: float) -> tuple[list[list[int]], list[int]]:
    """Elements of the trained parameters by the optimizer's groups, and of the frozen ones."""
    groups = parameter_groups(student, weight_decay)
    frozen = [p.numel() for p in student.parameters() if not p.requires_grad]
    return [[p.numel() for p in group["params"]] for group in groups], frozen


def _count_teacher(student: Student) -> int:
    return sum(
        parameter.numel()
        for name, parameter in student.named_parameters()
        if name.split(".")[0] not in TRAINING_ONLY
    )


def _check_numbers(arguments: argparse.Namespace) -> None:
    limits = {
        "nodes": (1, None, "a whole number from 1"),
        "gpus_per_node": (1, None, "a whole number from 1"),
        "mfu": (1e-6, 1, "a share in (0, 1]"),
        "bandwidth": (1e-6, None, "gigabytes a second, above 0"),
        "samples": (1, None, "a number from 1"),
        "caption_tokens": (2, None, "a number from 2"),
    }
    for name, (low, high, wanted) in limits.items():
        value = getattr(arguments, name)
        if value is not None and not low <= value <= (high or math.inf):
            raise ConfigError(f"--{name} is {value:g}; give {wanted}")
