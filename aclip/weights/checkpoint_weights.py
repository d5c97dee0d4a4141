"""The weights of a checkpoint outside of training: found, verified, whole, with their recipe."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from aclip.config.recipe import Recipe
from aclip.config.recipe_file import load_recipe
from aclip.config.text_folder import with_recorded_text
from aclip.errors import ConfigError
from aclip.models.student import Student, build_student
from aclip.run_folder.checkpoint_folder import STUDENT, TEACHER, verify
from aclip.run_folder.layout import RECIPE_FILE, TEXT_FOLDER, latest_record
from aclip.weights.first_look import find_checkpoint


@dataclass(frozen=True)
class CheckpointWeights:
    """A model out of a checkpoint.

    Attributes:
        folder: of the checkpoint. model: "student" or "teacher".
        recipe: its run's latest. student: that recipe's, on the meta device, for its shapes.
        state: the model's fp32 tensors by aclip's names; what the teacher does not average, such
            as the logit scale, is the student's.
    """

    folder: Path
    model: str
    recipe: Recipe
    student: Student
    state: dict[str, Tensor]


def load_checkpoint_weights(path: str, model: str | None) -> CheckpointWeights:
    """Reads the weights in a checkpoint folder, or in the latest checkpoint of a run folder.

    Args:
        path: see find_checkpoint.
        model: "student", "teacher", or None for the teacher where there is one.

    Raises:
        ConfigError: no checkpoint, no such model in it, it is damaged, or its run's recipe is
            missing or builds other shapes.
    """
    folder, model = find_checkpoint(path, model)
    file = TEACHER if model == "teacher" else STUDENT
    problem = verify(folder, [file, STUDENT])
    if problem is not None:
        raise ConfigError(f"checkpoint {folder} is damaged: {problem}; take another one")
    recipe = _recipe_of(folder)
    with torch.device("meta"):
        student = build_student(recipe, for_training=False)
    # What the teacher does not average, such as the logit scale, is the student's.
    state = load_file(folder / STUDENT) | load_file(folder / file)
    state = {name: tensor for name, tensor in state.items() if student.is_of_model(name)}
    _check_shapes(folder, student, state)
    return CheckpointWeights(folder, model, recipe, student, state)


def _recipe_of(folder: Path) -> Recipe:
    path = latest_record(folder.resolve().parent.parent, RECIPE_FILE)
    if not path.is_file():
        raise ConfigError(
            f"checkpoint {folder} is not in the folder of its run, whose recipe.yaml is needed; "
            f"put that file at {path}"
        )
    return with_recorded_text(load_recipe(str(path)), path.parent / TEXT_FOLDER)


def _check_shapes(folder: Path, student: Student, state: dict[str, Tensor]) -> None:
    built = {name: list(p.shape) for name, p in student.model_parameters().items()}
    saved = {name: list(tensor.shape) for name, tensor in state.items()}
    for name in sorted(built.keys() | saved.keys()):
        if built.get(name) != saved.get(name):
            raise ConfigError(
                f"checkpoint {folder} has {name} of shape {saved.get(name, 'absent')}, but the "
                f"recipe of its run builds {built.get(name, 'none')}; put back the run's own"
            )
