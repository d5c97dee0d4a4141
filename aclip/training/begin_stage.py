"""How a stage goes on with what the stage before it left: weights, teacher and, if asked for, the
optimizer's state; and whether it will be able to, before anything is trained."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from aclip.engine.sharded_state import MASTER, ShardedState, whole_shape
from aclip.errors import ConfigError
from aclip.models.student import build_student
from aclip.run_folder.checkpoint_folder import STUDENT, TEACHER
from aclip.training import checkpoint
from aclip.training.stage import Stage
from aclip.training.teacher import Teacher
from aclip.training.term_state import load_terms
from aclip.weights.initial_weights import IMAGE_POSITIONS, resize_image_positions


def check_stages(stages: list[Stage]) -> None:
    """Builds the towers of all stages without memory, and hands the weights on.

    Args:
        stages: what is to be trained, in order.

    Raises:
        ConfigError: a stage's towers can't be built, or can't take the weights of the stage before;
            says which stage.
    """
    if len(stages) == 1:
        return  # its own towers are built at once
    left: dict[str, Tensor] = {}
    for stage in stages:
        try:
            with torch.device("meta"):
                student = build_student(stage.recipe)
                shapes = {name: p.shape for name, p in student.named_parameters()}
                num_prefix = student.image.num_prefix_positions
                for name, shape in shapes.items():
                    if name in left:
                        _fitted(name, left[name], shape, num_prefix)
        except ConfigError as error:
            raise ConfigError(f"stage {stage.place.number} of the recipe: {error}") from None
        left = dict(student.named_parameters())


def begin_stage(folder: Path, engine, teacher: Teacher | None, keeps_optimizer: bool) -> None:
    """Writes a checkpoint of the stage before into a freshly built engine. A collective.

    What a loss term counts over the steps goes on, and image positions are resized for another
    resolution. A part that only this stage has, such as the head of a loss, begins anew, and one
    that only the stage before has is left behind. A teacher that the stage before does not have
    begins as the student is, and so does what the stage does not train.

    Args:
        folder: the checkpoint, from any ZeRO stage and number of ranks.
        keeps_optimizer: whether the optimizer goes on with its state, but for parameters that are
            new or resized; else it begins with none.

    Raises:
        ConfigError: a part has another shape, or the optimizer whose state is kept is another.
    """
    sharded = ShardedState(engine)
    shapes = {name: whole_shape(p) for name, p in sharded.parameters.items()}
    num_prefix = engine.module.image.num_prefix_positions
    left = load_file(folder / STUDENT)
    weights = {n: _fitted(n, left[n], shapes[n], num_prefix) for n in shapes if n in left}
    for name, tensor in weights.items():
        sharded.load(name, MASTER, tensor)
    if keeps_optimizer:
        unchanged = {name for name in weights if left[name].shape == shapes[name]}
        checkpoint.load_optimizer(folder, sharded, unchanged)
    if teacher is not None:
        if (folder / TEACHER).is_file():
            averages = load_file(folder / TEACHER).items()
            weights |= {
                n: _fitted(n, average, shapes[n], num_prefix)
                for n, average in averages
                if n in shapes and sharded.parameters[n].requires_grad
            }
        teacher.load_state_dict(teacher.state_dict() | weights)
    load_terms(folder, engine.module.terms, may_begin=True)


def _fitted(name: str, tensor: Tensor, shape: torch.Size, num_prefix: int) -> Tensor:
    if tensor.shape == shape:
        return tensor
    resized = None
    if name == IMAGE_POSITIONS:
        resized = resize_image_positions(tensor, shape, num_prefix)
    if resized is None:
        raise ConfigError(
            f"{name} is {list(tensor.shape)} in the stage before and {list(shape)} in this one; "
            "keep the key of the recipe that shapes it"
        )
    return resized
