"""Every operation of a training step, in order, at a real batch size: what a roofline adds up.

As in measure_step.py the step runs without values. What DeepSpeed does is not run; see
engine_operations.py. Views are as the loader cuts them: cropping on the device is not in it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode

from aclip.config.recipe import Recipe
from aclip.data.batch import Batch
from aclip.data.images.augment import augment
from aclip.engine.muon import orthogonal
from aclip.engine.optimizer import MOMENTS, parameter_groups, student_groups
from aclip.kernels.augment_views import augment_views
from aclip.method.losses.term import StudentOutput, total
from aclip.planning.measure_step import META, as_first_of, build_on_meta, of_batch, resized
from aclip.planning.meter import fused_attention
from aclip.planning.operations import Operation, OperationLog, fuse

VIEWS, TEACHER, STUDENT, LOSSES = "views", "teacher", "student forward", "losses"
BACKWARD, UPDATE, EMA = "backward", "optimizer step", "EMA"
PARTS = (VIEWS, TEACHER, STUDENT, LOSSES, BACKWARD, UPDATE, EMA)
COMPILED = {TEACHER, STUDENT, BACKWARD}
"""The parts that `model.compile` touches."""


@dataclass(frozen=True)
class Trace:
    """The operations of a step, without DeepSpeed's.

    Attributes:
        operations: in order, each under one of PARTS.
        sizes: bytes of the storages that they read and write.
        groups: elements of each trained parameter, by parameter group.
        num_moments: tensors of a parameter's shape that the optimizer keeps, by parameter group.
    """

    operations: list[Operation]
    sizes: list[int]
    groups: list[list[int]]
    num_moments: list[int]

    @property
    def trained(self) -> list[int]:
        """Elements of each trained parameter."""
        return [numel for group in self.groups for numel in group]

    def compiled(self, parts: set[str]) -> list[Operation]:
        """The operations when these parts are compiled."""
        return fuse(self.operations, self.sizes, parts) if parts else self.operations


def trace_step(
    recipe: Recipe,
    batch: Batch,
    num_ranks: int = 1,
    num_micro_steps: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    progress: float = 1.0,
) -> Trace:
    """Runs what `Stepper.step` runs, as the first of `num_ranks` ranks.

    Args:
        recipe: read as it is, but without torch.compile; see operations.fuse.
        batch: a micro-batch, on the CPU.
        num_micro_steps: how many of them a step has. Towers and teacher run once here, and their
            operations say how often they would; heads and losses run on the whole local batch.
        dtype: the dtype of the towers.
        progress: how much of the run is done, in [0, 1].
    """
    student, teacher, inputs = build_on_meta(recipe, dtype)
    local_size = len(batch) * num_micro_steps
    encodings = 2 * num_micro_steps - 1
    # A run's first step makes the mean and deviation of colours, which the others find there.
    augment(torch.empty(1, 3, 1, 1, dtype=torch.uint8, device=META), None, recipe.augment, dtype)
    log = OperationLog()
    with as_first_of(num_ranks), fused_attention(), log:
        log.begin(TEACHER, num_micro_steps)
        taught = inputs.teach(batch)
        statistics = inputs.statistics([batch], [taught])
        log.begin(STUDENT, encodings)
        features = student("encode", inputs.student(batch, taught, statistics, progress))
        whole = {
            name: resized(part, local_size).detach().requires_grad_(part.requires_grad)
            for name, part in features.items()
        }
        log.begin(LOSSES)
        num_captions = resized(inputs.num_captions(batch), local_size)
        output = StudentOutput.of(student("project", whole), num_captions)
        targets = {}
        if teacher is not None:
            targets = teacher.targets(student.terms, [of_batch(taught, local_size)])
        loss, _ = total(student.terms, output, targets)
        log.begin(BACKWARD)
        loss.backward()
        log.begin(BACKWARD, num_micro_steps)
        trained = {name: part for name, part in features.items() if part.requires_grad}
        gradients = [resized(whole[name].grad, len(batch)) for name in trained]
        torch.autograd.backward(list(trained.values()), gradients)
        log.begin(UPDATE)
        groups = student_groups(student, recipe.optimizer)
        _orthogonalise(groups, num_ranks)
        log.begin(EMA)
        if teacher is not None:
            teacher.update(student, 0.99)
    operations = _copied_beside(_with_views_apart(log.operations))
    counts = [[p.numel() for p in group["params"]] for group in groups]
    return Trace(operations, log.sizes, counts, [group["num_moments"] for group in groups])


def _orthogonalise(groups: list[dict], num_ranks: int) -> None:
    """What Muon computes of a rank's share of the matrices."""
    matrices = [p for group in groups if group["orthogonal"] for p in group["params"]]
    for matrix in sorted(matrices, key=Tensor.numel, reverse=True)[::num_ranks]:
        orthogonal(matrix.detach())


def trace_open_clip(recipe: Recipe, batch_size: int) -> Trace:
    """Runs open_clip's step with the recipe's towers on one rank, in bf16 autocast."""
    # Imported here: open_clip takes seconds, and a plan can do without.
    from aclip.planning.open_clip_step import CLIP, CONTEXT_LENGTH, open_clip_loss, open_clip_sizes

    sizes = open_clip_sizes(recipe)
    side = recipe.model.image.resolution
    log = OperationLog()
    with FakeTensorMode(), _autocast_as_on_a_gpu():
        model = CLIP(**sizes)
        model.visual.patch_dropout.prob = 0.0
        views = torch.empty(batch_size, 3, side, side, dtype=torch.uint8)
        ids = torch.empty(batch_size, CONTEXT_LENGTH, dtype=torch.int64)
        log.operations.append(Operation("to_gpu", VIEWS, from_host=views.nbytes + ids.nbytes))
        with fused_attention(), log:
            log.begin(STUDENT)
            pixels = augment_views(views, None, *torch.ones(2, 3).unbind(), torch.float32)
            with torch.autocast("cpu", torch.bfloat16):
                loss = open_clip_loss(model, pixels, ids)
            log.begin(BACKWARD)
            loss.backward()
        groups = parameter_groups(model, weight_decay=0.0)
    counts = [[p.numel() for p in group["params"]] for group in groups]
    return Trace(_with_views_apart(log.operations), log.sizes, counts, [len(MOMENTS)] * len(groups))


def _copied_beside(operations: list[Operation]) -> list[Operation]:
    """The batch's copies from the host take no time of a step: they run beside the step before it
    (data/workers.py)."""
    return [replace(each, from_host=0) if each.from_host else each for each in operations]


def _with_views_apart(operations: list[Operation]) -> list[Operation]:
    """Copies from the host and colour operations become a part of their own, whichever part they
    ran in."""
    return [
        replace(each, part=VIEWS) if each.from_host or each.name == "augment_views" else each
        for each in operations
    ]


@contextmanager
def _autocast_as_on_a_gpu() -> Iterator[None]:
    """Lets layer norms and the loss run in fp32: autocast does so on a GPU and not on a CPU."""
    with _in_fp32("layer_norm"), _in_fp32("cross_entropy"):
        yield


@contextmanager
def _in_fp32(name: str) -> Iterator[None]:
    plain: Callable[..., Tensor] = getattr(F, name)

    def in_fp32(x: Tensor, *args, **kwargs) -> Tensor:
        return plain(x.float(), *args, **kwargs)

    setattr(F, name, in_fp32)
    try:
        yield
    finally:
        setattr(F, name, plain)
