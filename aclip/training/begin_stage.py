"""How a stage goes on with what the stage before it left: weights, teacher and, if asked for, the
optimizer's state."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from aclip.engine.sharded_state import MASTER, ShardedState, whole_shape
from aclip.errors import ConfigError
from aclip.run_folder.checkpoint_folder import STUDENT, TEACHER
from aclip.training import checkpoint
from aclip.training.teacher import Teacher
from aclip.training.term_state import load_terms
from aclip.weights.initial_weights import IMAGE_POSITIONS, resize_image_positions


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
