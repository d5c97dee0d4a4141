"""What a run asks of each of its ranks under every ZeRO stage alike: counted and measured."""

from dataclasses import dataclass

import torch

from aclip.config.optimizer import OptimizerConfig
from aclip.config.recipe import Recipe
from aclip.config.sections import Recompute
from aclip.data.batch import Batch
from aclip.engine.optimizer import student_groups
from aclip.models.student import Student, build_student
from aclip.planning.measure_step import META, MODES, Measured, measure_run
from aclip.planning.run_memory import CheckpointCopies, checkpoint_copies
from aclip.planning.step_kinds import EPOCH_SAMPLES
from aclip.training.teacher import Teacher


@dataclass(frozen=True)
class Workload:
    """What is the same under every ZeRO stage.

    Attributes:
        groups: the trained parameters' numbers of elements, by parameter group.
        num_moments: tensors of a parameter's shape that the optimizer keeps, by parameter group.
        orthogonal: elements that Muon sends besides gradients and weights, in bf16; 0 for others.
        frozen: the frozen parameters' numbers of elements.
        teacher: the EMA teacher's number of elements.
        checkpoint: the copies for a checkpoint, in rank 0's host memory.
        global_batch_size: images in a step. num_ranks: how many GPUs there are.
        measured: a step on one GPU, by the bytes of a weight.
        batch_bytes: pixels that a GPU holds for each image of its local batch.
    """

    groups: list[list[int]]
    num_moments: list[int]
    orthogonal: int
    frozen: list[int]
    teacher: int
    checkpoint: CheckpointCopies
    global_batch_size: int
    num_ranks: int
    measured: dict[int, Measured]
    batch_bytes: float = 0.0

    @property
    def local_batch_size(self) -> int:
        return self.global_batch_size // self.num_ranks


def describe_workload(
    recipe: Recipe,
    batch: Batch,
    num_ranks: int,
    dtypes: set[torch.dtype],
    modes: tuple[Recompute, ...] = MODES,
    num_samples: float = EPOCH_SAMPLES,
) -> Workload:
    """Counts parameters and measures steps of the recipe on such batches, see measure_run."""
    with META:
        student = build_student(recipe)
    keeps_average = recipe.average_momentum is not None
    teacher = Teacher(student, torch.float32, META).state_dict() if keeps_average else {}
    groups = student_groups(student, recipe.optimizer)
    kept = {p: group["num_moments"] for group in groups for p in group["params"]}
    return Workload(
        **count_parameters(student, recipe.optimizer),
        orthogonal=sum(p.numel() for g in groups if g["orthogonal"] for p in g["params"]),
        teacher=sum(average.numel() for average in teacher.values()),
        checkpoint=checkpoint_copies(student, list(teacher.values()), kept),
        global_batch_size=recipe.train.global_batch_size,
        num_ranks=num_ranks,
        measured={
            dtype.itemsize: measure_run(recipe, batch, num_samples, num_ranks, dtype, modes)
            for dtype in dtypes
        },
    )


def count_parameters(student: Student, config: OptimizerConfig) -> dict[str, list]:
    """`groups`, `num_moments` and `frozen` of a Workload."""
    groups = student_groups(student, config)
    return {
        "groups": [[p.numel() for p in group["params"]] for group in groups],
        "num_moments": [group["num_moments"] for group in groups],
        "frozen": [p.numel() for p in student.parameters() if not p.requires_grad],
    }
