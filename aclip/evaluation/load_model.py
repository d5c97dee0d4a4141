"""The model that is evaluated: out of a run, or out of a file or folder of another project."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from aclip.config.recipe import Recipe
from aclip.config.recipe_file import load_recipe, recipe_of_values
from aclip.data.tokenizer import build_tokenizer
from aclip.errors import ConfigError
from aclip.evaluation.towers import Towers
from aclip.method.losses.terms import no_auxiliary_terms
from aclip.models.student import Student, build_student
from aclip.run_folder.checkpoint_folder import locate
from aclip.run_folder.layout import RECIPE_FILE
from aclip.weights.checkpoint_weights import load_checkpoint_weights
from aclip.weights.formats import open_clip, slip
from aclip.weights.initial_weights import load_initial_weights
from aclip.weights.tensors_file import read_tensors

RESAMPLE = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@dataclass(frozen=True)
class LoadedModel:
    """A model in fp32 and eval mode, without heads of training.

    Attributes:
        description: what it is and where it comes from, in words.
        recipe: whose towers it has. resample: how images are scaled.
    """

    description: str
    student: Student
    recipe: Recipe
    resample: Image.Resampling = Image.Resampling.BILINEAR

    def towers(self, device: torch.device) -> Towers:
        self.student.to(device)
        return Towers(
            self.student.encode_image,
            self.student.encode_text,
            build_tokenizer(self.recipe.model.text),
            self.recipe.model.image.resolution,
            device,
            torch.float32,
            self.recipe.augment.mean,
            self.recipe.augment.std,
            self.resample,
        )


def load_model(path: str, model: str | None = None, recipe_name: str | None = None) -> LoadedModel:
    """Loads what `launch/evaluate.py` is given.

    Args:
        path: a run, a checkpoint, a safetensors export of aclip, a SLIP or A-CLIP checkpoint, or an
            open_clip `local-dir` folder.
        model: "student" or "teacher" of a run; None for the teacher if there is one.
        recipe_name: whose towers a file has; None for what it says itself.

    Raises:
        ConfigError: nothing such is there, or it can't be told or built what it holds.
    """
    source = Path(path.removeprefix("local-dir:"))
    if locate(source) is not None:
        weights = load_checkpoint_weights(path, model)
        student = build_student(weights.recipe, for_training=False).eval()
        with torch.no_grad():
            for name, parameter in student.model_parameters().items():
                parameter.copy_(weights.state[name])
        return LoadedModel(f"{weights.model} of {weights.folder}", student, weights.recipe)
    if model is not None:
        raise ConfigError(
            f"--model is {model}, but {path} is no run and holds one model; leave --model out"
        )
    try:
        recipe, scale = _recipe_of(source, recipe_name)
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"the checkpoint is {path}, which {error}; give a run, or a SLIP, A-CLIP or open_clip "
            "model, or say with --recipe which towers it has"
        ) from None
    student = build_student(recipe, for_training=False).eval()
    weights_file = source / "model.safetensors"
    is_export = source.is_dir() and weights_file.is_file()
    try:
        report = load_initial_weights(student, str(weights_file if is_export else source))
    except ConfigError as error:
        message = str(error).removeprefix("--init is")
        raise ConfigError(f"the checkpoint is{message}") from None
    return LoadedModel(f"{report.layout} {path}", student, recipe, RESAMPLE[scale])


def _recipe_of(source: Path, recipe_name: str | None) -> tuple[Recipe, str]:
    """The recipe whose towers the weights have, and how images are scaled.

    Raises:
        ValueError: it can't be told; the message ends a sentence.
    """
    folder = source if source.is_dir() else source.parent
    if recipe_name is not None:
        return load_recipe(recipe_name), "bilinear"
    if not source.exists():
        raise ValueError("does not exist")
    if source.is_dir() and (source / open_clip.CONFIG).is_file():
        values, scale = open_clip.recipe_values(source)
        return _towers_alone(values, source), scale
    if (source.is_dir() or source.suffix == ".safetensors") and (folder / RECIPE_FILE).is_file():
        return load_recipe(str(folder / RECIPE_FILE)), "bilinear"
    if source.is_dir():
        raise ValueError("holds neither a checkpoint nor an open_clip model")
    tensors = read_tensors(source)
    if not slip.is_released(tensors):
        raise ValueError("has keys of no known layout")
    return _towers_alone({"model": slip.model_values(tensors)}, source), "bilinear"


def _towers_alone(values: dict[str, Any], source: Path) -> Recipe:
    """A recipe that builds the towers and nothing else."""
    plain = {
        "mask": {"policy": "none"},
        "views": {"student": 1},
        "loss": no_auxiliary_terms() | values.get("loss", {}),
    }
    return recipe_of_values(values | plain, str(source))
