"""A run's student and teacher as an evaluation takes them."""

from collections.abc import Callable

from torch import Tensor

from aclip.data.images.augment import augment
from aclip.data.tokenizer import build_tokenizer
from aclip.evaluation.towers import Encoder, Towers
from aclip.training.stepper import Stepper


def evaluated_models(stepper: Stepper) -> dict[str, Towers]:
    """The towers of "student" and, where the recipe has one, "teacher".

    The student's towers run through DeepSpeed's engine, which the caller brings into eval mode;
    under ZeRO-3 every rank must call them equally often.
    """

    def through_engine(task: str) -> Encoder:
        return lambda batch: stepper.engine(task, batch)

    models = {
        "student": _towers(stepper, through_engine("encode_image"), through_engine("encode_text"))
    }
    if stepper.teacher is not None:
        models["teacher"] = _towers(
            stepper, stepper.teacher.encode_image, stepper.teacher.encode_text
        )
    return models


def teacher_scores(stepper: Stepper) -> Callable[[Tensor], Tensor] | None:
    """The function from teacher views (n, 3, T, T) uint8 to their scores (n, g, g) fp32, both on
    the CPU; None where the recipe has no teacher view. One rank may call it alone."""
    if not stepper.recipe.needs_teacher_view:
        return None

    def scores(views: Tensor) -> Tensor:
        pixels = augment(views.to(stepper.device), None, stepper.recipe.augment, stepper.dtype)
        score_layers = stepper.recipe.teacher.score_layers
        return stepper.teacher.forward(pixels, score_layers, with_features=False).scores.cpu()

    return scores


def _towers(stepper: Stepper, encode_image: Encoder, encode_text: Encoder) -> Towers:
    recipe = stepper.recipe
    return Towers(
        encode_image,
        encode_text,
        build_tokenizer(recipe.model.text),
        recipe.model.image.resolution,
        stepper.device,
        stepper.dtype,
        recipe.augment.mean,
        recipe.augment.std,
    )
