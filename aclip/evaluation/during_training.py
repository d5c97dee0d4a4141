"""Evaluation during training: models on the validation set, the kept-patch picture, and how much of
the known objects the mask keeps."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from aclip import distributed
from aclip.config.recipe import Recipe
from aclip.data.shards.listing import Shard, read_shard
from aclip.evaluation.evaluate_set import check_scored, evaluate_models
from aclip.evaluation.progress import SpokenProgress
from aclip.evaluation.sets.evaluation_set import ShardSet
from aclip.evaluation.sets.prompts import find_class_prompts
from aclip.evaluation.towers import Towers
from aclip.reports.kept_patches import (
    PictureSet,
    kept_object_patches,
    kept_object_share,
    read_picture_set,
)
from aclip.reports.mask_pictures import draw_figure

BATCH_SIZE = 256
PROGRESS_SECONDS = 10
NUM_MEASURED = 256
"""Validation samples that the mask is measured on, if they hold the masks of their objects."""


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        metrics: each model's metrics by its name, and those of "chance", equal on every rank. Rank
            0 also has "mask", the share of the objects' patches that the recipe's mask keeps, if
            the samples hold object masks.
        picture: the kept patches, (H, W, 3) uint8; None on the other ranks, where nothing is
            masked, or where no sample can be used.
    """

    metrics: dict[str, dict[str, float]]
    picture: np.ndarray | None = None


class Evaluator:
    """Scores models on the validation set whenever it is called.

    Args:
        recipe: the run's recipe.
        shards: the validation set.
    """

    def __init__(self, recipe: Recipe, shards: list[Shard]):
        self._recipe = recipe
        self._shards = shards
        self._prompts = find_class_prompts(Path(shards[0].url).parent)
        self._pictured: PictureSet | None = None

    def __call__(
        self, models: dict[str, Towers], teacher_scores: Callable[[Tensor], Tensor] | None
    ) -> Evaluation:
        """Evaluates all models; a collective, so every rank calls.

        Args:
            models: the models by their names, the student among them.
            teacher_scores: gives the attention (n, g, g) fp32 on teacher views (n, 3, T, T) uint8,
                both on the CPU; None where there are no such views. Rank 0 alone calls it.

        Raises:
            ConfigError: nothing can be scored. A run's first evaluation comes before its first
                step, so that this costs no training.
        """
        dataset = ShardSet(self._shards)
        progress = SpokenProgress("evaluation", PROGRESS_SECONDS, ends=False)
        metrics = evaluate_models(models, dataset, self._prompts, BATCH_SIZE, progress=progress)
        check_scored(metrics["student"], "data.val", dataset.name)
        metrics["chance"] = chance(metrics["student"])
        picture = None
        if distributed.rank() == 0 and self._recipe.mask.policy != "none":
            picture, share = self._inspect_mask(teacher_scores)
            if share is not None:
                metrics["mask"] = {"object_patches_kept": share}
        return Evaluation(metrics, picture)

    def _inspect_mask(
        self, teacher_scores: Callable[[Tensor], Tensor] | None
    ) -> tuple[np.ndarray | None, float | None]:
        """Draws and measures the mask on the same validation samples and views every time.

        Returns:
            The picture, and the share of the objects' patches that is kept; None for what the
            samples do not allow.
        """
        if self._pictured is None:
            raw = (sample for shard in self._shards for _, sample in read_shard(shard))
            self._pictured = read_picture_set(self._recipe, raw, NUM_MEASURED)
        pictured, policy = self._pictured, self._recipe.mask.policy
        if pictured is None:
            return None, None
        scores = None if teacher_scores is None else teacher_scores(pictured.images)
        picture = draw_figure(pictured.columns(policy, scores), pictured.captions)
        kept, total = kept_object_patches(pictured.keep_ids(policy, scores), pictured.coverage)
        return picture, kept_object_share(kept, total) if total.any() else None


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
