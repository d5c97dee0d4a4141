"""The model that is evaluated: out of a run, or out of a file or folder of another project."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from aclip.config.recipe import Recipe
from aclip.config.recipe_file import load_recipe, recipe_of_values
from aclip.config.text_folder import with_recorded_text
from aclip.data.tokenizer import build_tokenizer
from aclip.errors import ConfigError
from aclip.evaluation.towers import Towers
from aclip.method.losses.terms import no_auxiliary_terms
from aclip.models.student import Student, build_student
from aclip.run_folder.layout import RECIPE_FILE, TEXT_FOLDER
from aclip.weights.checkpoint_weights import load_checkpoint_weights
from aclip.weights.find_named import find_named
from aclip.weights.first_look import Found, refusal
from aclip.weights.formats import dual_encoder, open_clip, slip
from aclip.weights.initial_weights import load_initial_weights
from aclip.weights.recognise import open_found

RESAMPLE = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@dataclass(frozen=True)
class LoadedModel:
    """A model in fp32 and eval mode, without heads of training.

    Attributes:
        description: what it is and where it comes from, in words.
        recipe: the recipe that its towers are built from.
        resample: how images are scaled.
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
        path: a run, a checkpoint or an export of aclip, a SLIP or A-CLIP checkpoint, a training
            checkpoint or `local-dir` folder of open_clip's, or `hf-hub:` with a name of the Hub.
        model: "student" or "teacher" of a run; None for the teacher if there is one.
        recipe_name: the recipe whose towers a file holds; None for what the file says itself.

    Raises:
        ConfigError: there is no such model, or what it holds can't be told or built.
    """
    try:
        found = find_named(path)
    except ValueError as error:
        raise _refusal(path, error) from None
    if found.kind == "checkpoint":
        if found.model is not None and model not in (None, found.model):
            raise ConfigError(
                f"--model is {model}, but {path} holds the {found.model}; leave it out"
            )
        weights = load_checkpoint_weights(str(found.path), found.model or model)
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
        recipe, scale = _recipe_of(found, recipe_name)
    except ValueError as error:
        raise _refusal(path, error) from None
    student = build_student(recipe, for_training=False).eval()
    try:
        report = load_initial_weights(student, path)
    except ConfigError as error:
        message = str(error).removeprefix("--init is")
        raise ConfigError(f"the checkpoint is{message}") from None
    return LoadedModel(f"{report.layout} {path}", student, recipe, RESAMPLE[scale])


def _refusal(path: str, problem: ValueError) -> ConfigError:
    advice = (
        "give a run, or a SLIP, A-CLIP or open_clip model, or say with --recipe which towers it has"
    )
    return refusal(f"the checkpoint is {path}", problem, advice)


def _recipe_of(found: Found, recipe_name: str | None) -> tuple[Recipe, str]:
    """The recipe whose towers the weights have, and how images are scaled.

    Raises:
        ValueError: it can't be told; the message ends a sentence.
    """
    if recipe_name is not None:
        return load_recipe(recipe_name), "bilinear"
    path = found.path
    if found.kind in ("open_clip", "huggingface"):
        read = {"open_clip": open_clip, "huggingface": dual_encoder}[found.kind].recipe_values
        values, scale = read(path)
        return _towers_alone(values, path), scale
    beside = path.parent / RECIPE_FILE
    if path.suffix == ".safetensors" and beside.is_file():
        recipe = with_recorded_text(load_recipe(str(beside)), path.parent / TEXT_FOLDER)
        return recipe, "bilinear"
    weights = open_found(found)
    if not slip.is_released(weights.tensors):
        raise ValueError(
            f"does not tell its towers ({weights.layout}); say with --recipe which it has"
        )
    return _towers_alone({"model": slip.model_values(weights.tensors)}, path), "bilinear"


def _towers_alone(values: dict[str, Any], source: Path) -> Recipe:
    """A recipe that builds the towers and nothing else."""
    plain = {
        "mask": {"policy": "none"},
        "views": {"student": 1},
        "loss": no_auxiliary_terms() | values.get("loss", {}),
    }
    return recipe_of_values(values | plain, str(source))
