"""Evaluation during training: student and teacher on the validation set, and the kept-patch
picture."""

from pathlib import Path

import numpy as np

from aclip import gather
from aclip.config import Recipe
from aclip.data.augment import augment
from aclip.data.shards import Shard, read_shard
from aclip.data.tokenizer import build_tokenizer
from aclip.evaluation.kept_patches import PictureSet, read_picture_set
from aclip.evaluation.prompts import find_class_prompts
from aclip.evaluation.suite import evaluate
from aclip.evaluation.texts import Towers
from aclip.evaluation.validation import ShardSet
from aclip.files import write_whole
from aclip.metrics import picture_path
from aclip.visualize import draw_figure, encode

BATCH_SIZE = 256


class Evaluator:
    """Scores the model of a trainer whenever it is called.

    Args:
        recipe: of the run.
        shards: the validation set.
        run_folder: pictures go to its `pictures` folder.
    """

    def __init__(self, recipe: Recipe, shards: list[Shard], run_folder: Path):
        self._recipe = recipe
        self._shards = shards
        self._run_folder = run_folder
        self._tokenizer = build_tokenizer(recipe.model.text.context_length)
        self._prompts = find_class_prompts(Path(shards[0].url).parent)
        self._pictured: PictureSet | None = None

    def __call__(self, trainer) -> dict[str, dict[str, float]]:
        """{"student": metrics, "teacher": metrics, "chance": metrics}; equal on every rank."""
        engine, teacher = trainer.stepper.engine, trainer.stepper.teacher

        def through_engine(task: str):
            return lambda batch: engine(task, batch)

        results = {
            "student": self._score(
                trainer, through_engine("encode_image"), through_engine("encode_text")
            )
        }
        if teacher is not None:
            results["teacher"] = self._score(trainer, teacher.encode_image, teacher.encode_text)
        results["chance"] = chance(results["student"])
        if gather.rank() == 0 and self._recipe.mask.policy != "none":
            self._picture(trainer)
        return results

    def _score(self, trainer, encode_image, encode_text) -> dict[str, float]:
        augmentation = self._recipe.augment
        towers = Towers(
            encode_image,
            encode_text,
            self._tokenizer,
            self._recipe.model.image.resolution,
            trainer.device,
            trainer.stepper.dtype,
            augmentation.mean,
            augmentation.std,
        )
        return evaluate(towers, ShardSet(self._shards), self._prompts, BATCH_SIZE, gather)

    def _picture(self, trainer) -> None:
        picture = self._draw(trainer)
        if picture is None:
            return
        path = picture_path(self._run_folder, trainer.samples)
        try:
            write_whole(path, encode(picture))
        except OSError as error:  # a picture less must not end the run
            print(f"{path} was not written: {error.strerror or error}", flush=True)
        trainer.logger.log_image("kept_patches", picture, trainer.samples)

    def _draw(self, trainer) -> np.ndarray | None:
        """The kept patches of the same eight validation samples and views every time."""
        recipe = self._recipe
        if self._pictured is None:
            raw = (sample for shard in self._shards for _, sample in read_shard(shard))
            self._pictured = read_picture_set(recipe, raw)
        if self._pictured is None:
            return None
        scores = None
        if recipe.needs_teacher_view:
            images = self._pictured.images.to(trainer.device)
            pixels = augment(images, None, recipe.augment, trainer.stepper.dtype)
            scores = trainer.stepper.teacher.forward(pixels).scores.cpu()
        columns = self._pictured.columns(recipe.mask.policy, scores)
        return draw_figure(columns, self._pictured.captions)


def chance(metrics: dict[str, float]) -> dict[str, float]:
    """What guessing scores on the same set, for each metric of `evaluate`."""
    captions_per_image = metrics.get("num_captions", 0) / metrics["num_images"]
    expected = {}
    for name in metrics:
        if name == "zero_shot_roc_auc":
            expected[name] = 0.5
            continue
        if name == "zero_shot_mean_per_class":
            expected[name] = 1 / metrics["num_classes"]
            continue
        if name.startswith("zero_shot_top"):
            num_answers, num_right = metrics["num_classes"], 1
        elif name.startswith("image_to_text_r"):
            num_answers, num_right = metrics["num_captions"], captions_per_image
        elif name.startswith("text_to_image_r"):
            num_answers, num_right = metrics["num_images"], 1
        else:
            continue
        k = int(name[len(name.rstrip("0123456789")) :])
        expected[name] = min(1.0, k * num_right / num_answers)
    return expected
