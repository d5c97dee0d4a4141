"""Evaluation during training: student and teacher on the validation set, the kept-patch picture,
and how much of the known objects the mask keeps."""

from pathlib import Path

import numpy as np

from aclip import distributed
from aclip.config.recipe import Recipe
from aclip.data.augment import augment
from aclip.data.shards.listing import Shard, read_shard
from aclip.data.tokenizer import build_tokenizer
from aclip.evaluation.evaluate_set import evaluate_set
from aclip.evaluation.sets.evaluation_set import ShardSet
from aclip.evaluation.sets.prompts import find_class_prompts
from aclip.evaluation.towers import Towers
from aclip.files import write_whole
from aclip.reports.kept_patches import (
    PictureSet,
    kept_object_patches,
    kept_object_share,
    read_picture_set,
)
from aclip.reports.mask_pictures import draw_figure, encode
from aclip.run_folder.layout import picture_path

BATCH_SIZE = 256
NUM_MEASURED = 256
"""Samples that the mask is measured on, where the validation set says where its objects are."""


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
        """{"student": metrics, "teacher": metrics, "chance": metrics}, equal on every rank.

        On rank 0 also "mask", the share of the objects' patches that the recipe's mask keeps, if
        the samples hold object masks.
        """
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
        if distributed.rank() == 0 and self._recipe.mask.policy != "none":
            self._inspect_mask(trainer, results)
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
        return evaluate_set(towers, ShardSet(self._shards), self._prompts, BATCH_SIZE)

    def _inspect_mask(self, trainer, results: dict) -> None:
        """Draws and measures the mask on the same validation samples and views every time."""
        recipe = self._recipe
        if self._pictured is None:
            raw = (sample for shard in self._shards for _, sample in read_shard(shard))
            self._pictured = read_picture_set(recipe, raw, NUM_MEASURED)
        pictured = self._pictured
        if pictured is None:
            return
        scores = None
        if recipe.needs_teacher_view:
            images = pictured.images.to(trainer.device)
            pixels = augment(images, None, recipe.augment, trainer.stepper.dtype)
            scores = trainer.stepper.teacher.forward(pixels).scores.cpu()
        columns = pictured.columns(recipe.mask.policy, scores)
        self._write_picture(trainer, draw_figure(columns, pictured.captions))
        keep_ids = pictured.keep_ids(recipe.mask.policy, scores)
        kept, total = kept_object_patches(keep_ids, pictured.coverage)
        if total.any():
            results["mask"] = {"object_patches_kept": kept_object_share(kept, total)}

    def _write_picture(self, trainer, picture: np.ndarray) -> None:
        path = picture_path(self._run_folder, trainer.samples)
        try:
            write_whole(path, encode(picture))
        except OSError as error:  # a picture less must not end the run
            print(f"{path} was not written: {error.strerror or error}", flush=True)
        trainer.logger.log_image("kept_patches", picture, trainer.samples)


def chance(metrics: dict[str, float]) -> dict[str, float]:
    """What guessing scores on the same set, for each metric of `evaluate_set`."""
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
