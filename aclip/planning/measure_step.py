"""What one training step computes and keeps, measured on the step itself.

It runs on the meta device: every operation is dispatched with its real shapes, none is computed.
A tower, a head or a loss term that a step gets later is counted without being described here.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial, reduce
from typing import get_args

import torch
import torch.distributed as dist
from torch import Tensor

from aclip.config.recipe import Recipe
from aclip.config.sections import Recompute
from aclip.data.batch import Batch
from aclip.distributed import world_size
from aclip.method.losses.term import StudentOutput, Taught, total
from aclip.models.student import Student, StudentInput, build_student
from aclip.planning.meter import Flops, Meter, add_up, fused_attention, merge, scaled
from aclip.planning.step_kinds import EPOCH_SAMPLES, step_kinds
from aclip.training.step_inputs import StepInputs
from aclip.training.teacher import Teacher

META = torch.device("meta")
TEACHER, STUDENT, MASK, LOSSES = "teacher", "student", "mask", "losses"
MODES: tuple[Recompute, ...] = get_args(Recompute)


@dataclass(frozen=True)
class Encoding:
    """What a sample costs in the student's `encode` and its backward pass.

    Attributes:
        flops: FLOPs by part.
        kept: bytes kept from the forward to the backward pass, and, where that is more, what the
            backward pass holds while it recomputes something.
    """

    flops: dict[str, Flops]
    kept: float


@dataclass(frozen=True)
class Measured:
    """A step on one rank.

    A part is a module of the student under its name there, or one of `student` (what the student
    computes outside of its modules), `teacher`, `mask` and `losses`.

    Attributes:
        encoding: the cost of `encode` by what all towers recompute; None stands for what the recipe
            says.
        other_flops: FLOPs per sample outside of `encode`, by part.
        heads: bytes that `project` keeps of the local batch until the backward pass.
        losses: the most bytes that the loss terms hold for the local batch.
        collectives: bytes in the collectives of heads and losses, counted as by Meter.
    """

    encoding: dict[Recompute | None, Encoding]
    other_flops: dict[str, Flops]
    heads: int
    losses: int
    collectives: int

    @property
    def flops(self) -> dict[str, Flops]:
        """FLOPs per sample by part, with nothing run twice."""
        return merge(self.encoding["none"].flops, self.other_flops)

    @property
    def total_flops(self) -> float:
        return add_up(self.flops).total

    def repeated_flops(self, num_micro_steps: int) -> float:
        """FLOPs per sample that come on top because something runs twice: what the recipe
        recomputes, and `encode` in all micro_steps but the last (see Stepper.step)."""
        once = add_up(self.encoding["none"].flops)
        recomputed = add_up(self.encoding[None].flops).total - once.total
        return recomputed + once.forward * (num_micro_steps - 1) / num_micro_steps


def build_on_meta(recipe: Recipe, dtype: torch.dtype) -> tuple[Student, Teacher | None, StepInputs]:
    """What a step runs, on the meta device and without torch.compile; the teacher where a run keeps
    an average."""
    model = recipe.model.model_copy(update={"compile": False})
    with META:
        student = build_student(recipe.model_copy(update={"model": model})).to(dtype)
    keeps_average = recipe.average_momentum is not None
    teacher = Teacher(student, dtype, META) if keeps_average else None
    inputs = StepInputs(recipe, student.terms, teacher, student.image, META, dtype)
    return student, teacher, inputs


def measure_step(
    recipe: Recipe,
    batch: Batch,
    num_ranks: int = 1,
    dtype: torch.dtype = torch.float32,
    modes: tuple[Recompute, ...] = MODES,
    progress: float = 1.0,
) -> Measured:
    """Runs what `Stepper.step` runs, as the first of `num_ranks` ranks, and measures it.

    The towers read `batch`. Heads and losses, some of which grow with the square of their rows,
    read as many rows of features as the rank has images in a step.

    Args:
        recipe: read as it is, but without torch.compile.
        batch: any number of samples, on the CPU.
        dtype: the dtype of the towers.
        modes: what all towers recompute, one measurement each; `Measured.flops` needs `none`.
        progress: how much of the run is done, in [0, 1].
    """
    student, teacher, inputs = build_on_meta(recipe, dtype)
    size, local_size = len(batch), recipe.train.global_batch_size // num_ranks
    meter = Meter()
    meter.name_parts(student)
    inputs.select = meter.as_part(MASK, inputs.select)  # the mask's FLOPs count apart
    with as_first_of(num_ranks), fused_attention(), meter:
        meter.begin(TEACHER, size)
        taught = inputs.teach(batch)
        statistics = inputs.statistics([batch], [taught])
        make_input = partial(inputs.student, batch, taught, statistics, progress)
        other_flops = meter.take_flops()

        encoding: dict[Recompute | None, Encoding] = {}
        encoding[None], features = _encode(student, make_input, size, meter)
        towers = [module for module in student.modules() if hasattr(module, "recompute")]
        own_modes = {tower.recompute for tower in towers}
        for mode in modes:
            for tower in towers:
                tower.recompute = mode
            encoding[mode] = encoding[None]
            if own_modes != {mode}:
                encoding[mode], _ = _encode(student, make_input, size, meter)

        meter.begin(STUDENT, local_size)
        joined = {
            name: resized(part, local_size).requires_grad_(part.requires_grad)
            for name, part in features.items()
        }
        num_captions = resized(inputs.num_captions(batch), local_size)
        output = StudentOutput.of(student("project", joined), num_captions)
        heads = meter.held
        meter.begin(TEACHER, local_size)
        targets = {}
        if teacher is not None:
            targets = teacher.targets(student.terms, [of_batch(taught, local_size)])
        meter.begin(LOSSES, local_size)
        loss, _ = total(student.terms, output, targets)
        of_losses = meter.peak
        meter.turn_back()
        loss.backward()
    other_flops = merge(other_flops, meter.take_flops())
    return Measured(encoding, other_flops, heads, of_losses, meter.collectives)


def measure_run(
    recipe: Recipe,
    batch: Batch,
    num_samples: float = EPOCH_SAMPLES,
    num_ranks: int = 1,
    dtype: torch.dtype = torch.float32,
    modes: tuple[Recompute, ...] = MODES,
) -> Measured:
    """The average step of a run: FLOPs are means over its kinds of step, memory is what the kind
    takes that takes the most. Arguments are those of `step_kinds` and `measure_step`."""
    first, *others = step_kinds(recipe, batch, num_samples)
    largest = measure_step(recipe, first.batch, num_ranks, dtype, modes, first.progress)
    flops = scaled(largest.other_flops, first.share)
    encoding = {first.num_kept_blocks: largest.encoding}
    shares = {first.num_kept_blocks: first.share}
    for kind in others:
        kept = kind.num_kept_blocks
        more = () if kept in encoding else modes
        other = measure_step(recipe, kind.batch, num_ranks, dtype, more, kind.progress)
        flops = merge(flops, scaled(other.other_flops, kind.share))
        encoding.setdefault(kept, other.encoding)
        shares[kept] = shares.get(kept, 0.0) + kind.share
    if len(encoding) == 1:
        return replace(largest, other_flops=flops)
    average = {
        mode: Encoding(_mean_flops([(shares[k], encoding[k][mode].flops) for k in shares]), of.kept)
        for mode, of in largest.encoding.items()
    }
    return replace(largest, encoding=average, other_flops=flops)


def _mean_flops(shares: list[tuple[float, dict[str, Flops]]]) -> dict[str, Flops]:
    """The FLOPs of parts, of kinds of step with their shares."""
    return reduce(merge, (scaled(flops, share) for share, flops in shares))


def _encode(
    student: Student, make_input: Callable[[], StudentInput], size: int, meter: Meter
) -> tuple[Encoding, dict[str, Tensor]]:
    """Measures `encode` with its backward pass; also returns the features."""
    meter.begin(TEACHER, size)
    inputs = make_input()
    meter.part = STUDENT
    features = student("encode", inputs)
    del inputs  # as in a step, where only what the graph keeps of it lives on
    surrogate = sum(part.float().sum() for part in features.values())
    meter.turn_back()
    surrogate.backward()
    return Encoding(meter.take_flops(), meter.peak / size), features


def of_batch(taught: Taught, num_rows: int) -> Taught:
    """The same tensors with another number of samples."""
    return Taught(*(resized(getattr(taught, part.name), num_rows) for part in fields(taught)))


def resized(tensor: Tensor | None, num_rows: int) -> Tensor | None:
    """A tensor with another number of rows; None stays None."""
    return None if tensor is None else tensor.new_empty(num_rows, *tensor.shape[1:])


@contextmanager
def as_first_of(num_ranks: int) -> Iterator[None]:
    """Makes this process the first of so many ranks, whose collectives send nothing."""
    if num_ranks == world_size():
        yield
        return
    dist.init_process_group("fake", rank=0, world_size=num_ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()
