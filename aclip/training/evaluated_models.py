"""A run's student and teacher as an evaluation takes them."""

from torch import Tensor

from aclip.data.images.augment import augment
from aclip.data.tokenizer import build_tokenizer
from aclip.evaluation.mask_signals import MaskTeacher
from aclip.evaluation.towers import Encoder, Towers
from aclip.method.masks.policy import Selection
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


def mask_teacher(stepper: Stepper) -> MaskTeacher | None:
    """The teacher that a mask is measured with; None where the recipe has no teacher view, or its
    tower no attention to show."""
    if not stepper.recipe.needs_teacher_view or not stepper.teacher.model.image.has_scores:
        return None
    teacher, device = stepper.teacher, stepper.device
    tokenizer = build_tokenizer(stepper.recipe.model.text)
    score_layers = stepper.recipe.teacher.score_layers

    def pixels(views: Tensor) -> Tensor:
        return augment(views.to(device), None, stepper.recipe.augment, stepper.dtype)

    def scores(views: Tensor) -> Tensor:
        return teacher.forward(pixels(views), score_layers, with_features=False).scores.cpu()

    def embed_kept(views: Tensor, selection: Selection) -> Tensor:
        on_device = selection.map(lambda tensor: tensor.to(device))
        embeds = teacher.encode_image(pixels(views.flatten(0, 1)), on_device)
        return embeds.unflatten(0, views.shape[:2]).float().cpu()

    def embed_texts(texts: list[str]) -> Tensor:
        tokens = tokenizer.encode(texts).map(lambda ids: ids.to(device))
        return teacher.encode_text(tokens).float().cpu()

    return MaskTeacher(scores, embed_kept, embed_texts)


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
