"""What one training step computes and keeps, measured on the step itself.

It runs on the meta device: every operation is dispatched with its real shapes, none is computed.
What a step gets later, a tower, a head or a loss term, is counted without being described here.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import get_args

import torch
import torch.distributed as dist
from torch import Tensor

from aclip.config.geometry import kept_blocks
from aclip.config.recipe import Recipe, Recompute
from aclip.data.batch import Batch
from aclip.distributed import world_size
from aclip.method import losses
from aclip.method.losses import StudentOutput
from aclip.models.student import Student, StudentInput, build_student
from aclip.planning.meter import Flops, Meter, fused_attention
from aclip.training.step_inputs import StepInputs
from aclip.training.teacher import Teacher

META = torch.device("meta")
TEACHER, STUDENT, LOSSES = "teacher", "student", "losses"
MODES: tuple[Recompute, ...] = get_args(Recompute)


@dataclass(frozen=True)
class Encoding:
    """The student's `encode` and its backward pass, of one sample.

    Attributes:
        flops: by part.
        kept: bytes from the forward to the backward pass; with what that recomputes at a time,
            where it is more.
    """

    flops: dict[str, Flops]
    kept: float

    @property
    def total_flops(self) -> Flops:
        return sum(self.flops.values(), Flops())


@dataclass(frozen=True)
class Measured:
    """A step on one rank. Parts are the student's modules by their names, `student` for what it
    computes outside of them, `teacher` and `losses`.

    Attributes:
        encoding: by what all towers recompute; None for what the recipe says.
        other_flops: of a sample, by part, outside of `encode`.
        heads: bytes that the local batch keeps from `project` until its backward pass.
        losses: the most bytes that the loss terms of the local batch hold.
        collectives: bytes of the heads' and losses' collectives, see Meter.
    """

    encoding: dict[Recompute | None, Encoding]
    other_flops: dict[str, Flops]
    heads: int
    losses: int
    collectives: int

    @property
    def flops(self) -> dict[str, Flops]:
        """Of a sample, by part, with nothing run twice."""
        return add_parts(self.encoding["none"].flops, self.other_flops)

    @property
    def total_flops(self) -> float:
        return sum(part.total for part in self.flops.values())

    def repeated_flops(self, num_micro_steps: int) -> float:
        """A sample's FLOPs on top because something runs twice: what the recipe recomputes, and
        `encode` in all micro_steps but the last (Stepper.step)."""
        once = self.encoding["none"].total_flops
        recomputed = self.encoding[None].total_flops.total - once.total
        return recomputed + once.forward * (num_micro_steps - 1) / num_micro_steps


def measure_step(
    recipe: Recipe,
    batch: Batch,
    num_ranks: int = 1,
    dtype: torch.dtype = torch.float32,
    modes: tuple[Recompute, ...] = MODES,
) -> Measured:
    """Runs what `Stepper.step` runs, as the first of `num_ranks` ranks, and measures it.

    The towers read `batch`. Heads and losses, some of which grow with the square of their rows,
    read as many features as the rank's share of the global batch has.

    Args:
        recipe: as it is, but without torch.compile.
        batch: on the CPU, of any size.
        dtype: of the towers.
        modes: what the towers recompute in turn, `none` among them.
    """
    model = recipe.model.model_copy(update={"compile": False})
    with META:
        student = build_student(recipe.model_copy(update={"model": model})).to(dtype)
    teacher = Teacher(student, dtype, META) if recipe.needs_teacher else None
    grid = student.image.grid
    inputs = StepInputs(
        recipe, teacher, grid, kept_blocks(recipe, grid), student.image.patch_size, META, dtype
    )
    size, local_size = len(batch), recipe.train.global_batch_size // num_ranks
    meter = Meter()
    meter.name_parts(student)
    with _as_first_of(num_ranks), fused_attention(), meter:
        meter.begin(TEACHER, size)
        taught = inputs.teach(batch)
        make_input = partial(inputs.student, batch, taught, inputs.centre([taught]))
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
            name: _resized(part, local_size).requires_grad_() for name, part in features.items()
        }
        output = StudentOutput(**student("project", joined))
        heads = meter.held
        meter.begin(TEACHER, local_size)
        byol_target = None
        if recipe.loss.byol > 0:
            byol_target = teacher.project(_resized(taught.features, local_size))
        meter.begin(LOSSES, local_size)
        weights = recipe.loss
        loss, _ = losses.total(
            output, byol_target, weights.model_dump(), weights.simclr_temperature
        )
        of_losses = meter.peak
        meter.turn_back()
        loss.backward()
    other_flops = add_parts(other_flops, meter.take_flops())
    return Measured(encoding, other_flops, heads, of_losses, meter.collectives)


def add_parts(first: dict[str, Flops], second: dict[str, Flops]) -> dict[str, Flops]:
    """Both, those of the same part added up."""
    names = dict.fromkeys([*first, *second])
    return {name: first.get(name, Flops()) + second.get(name, Flops()) for name in names}


def _encode(
    student: Student, make_input: Callable[[], StudentInput], size: int, meter: Meter
) -> tuple[Encoding, dict[str, Tensor]]:
    """One input's `encode` with its backward pass, and its features, whose graph is gone."""
    meter.begin(TEACHER, size)
    inputs = make_input()
    meter.part = STUDENT
    features = student("encode", inputs)
    del inputs  # as in a step: of an input stays what the graph keeps
    surrogate = sum(part.float().sum() for part in features.values())
    meter.turn_back()
    surrogate.backward()
    return Encoding(meter.take_flops(), meter.peak / size), features


def _resized(tensor: Tensor, num_rows: int) -> Tensor:
    return tensor.new_empty(num_rows, *tensor.shape[1:])


@contextmanager
def _as_first_of(num_ranks: int) -> Iterator[None]:
    """Inside, this process is the first of so many ranks, whose collectives send nothing."""
    if num_ranks == world_size():
        yield
        return
    dist.init_process_group("fake", rank=0, world_size=num_ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()
