"""Evaluation during training: models on the validation set, the kept-patch picture, and what the
mask keeps of known objects and of the teacher's attention."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from aclip import distributed
from aclip.config.recipe import Recipe
from aclip.data.shards.listing import Shard, read_shard
from aclip.evaluation.evaluate_set import check_scored, evaluate_models
from aclip.evaluation.mask_signals import MaskSignals, MaskTeacher
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
"""Validation samples that the mask is measured on."""


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        metrics: each model's metrics by its name, and those of "chance", equal on every rank. Rank
            0 also has "mask": object_patches_kept, the share of the objects' patches that the
            recipe's mask keeps, if the samples hold object masks; and what MaskSignals measures,
            if the mask goes by the teacher's scores, or the policy's own `inspect`.
        picture: the kept patches, (H, W, 3) uint8; None on the other ranks, where nothing is
            masked, or where no sample can be used.
        warning: what is wrong with the mask, or "".
    """

    metrics: dict[str, dict[str, float]]
    picture: np.ndarray | None = None
    warning: str = ""


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
        self._signals: MaskSignals | None = None

    def __call__(
        self, models: dict[str, Towers], teacher: MaskTeacher | None, progress: float = 1.0
    ) -> Evaluation:
        """Evaluates all models; a collective, so every rank calls.

        Args:
            models: the models by their names, the student among them.
            teacher: what the mask is measured with, by rank 0 alone; None where there are no
                teacher views.
            progress: how much of the run is done, in [0, 1].

        Raises:
            ConfigError: nothing can be scored. A run's first evaluation comes before its first
                step, so that this costs no training.
        """
        dataset = ShardSet(self._shards)
        spoken = SpokenProgress("evaluation", PROGRESS_SECONDS, ends=False)
        metrics = evaluate_models(models, dataset, self._prompts, BATCH_SIZE, progress=spoken)
        check_scored(metrics["student"], "data.val", dataset.name)
        metrics["chance"] = chance(metrics["student"])
        if distributed.rank() > 0 or self._recipe.mask.policy == "none":
            return Evaluation(metrics)
        return self._inspect_mask(metrics, teacher, progress)

    def _inspect_mask(
        self, metrics: dict[str, dict[str, float]], teacher: MaskTeacher | None, progress: float
    ) -> Evaluation:
        """Draws and measures the mask on the same validation samples and views every time."""
        policy = self._recipe.mask_policy
        if self._pictured is None:
            raw = (sample for shard in self._shards for _, sample in read_shard(shard))
            self._pictured = read_picture_set(
                self._recipe, raw, NUM_MEASURED, needs_objects=not policy.reads_teacher
            )
        pictured = self._pictured
        if pictured is None:
            return Evaluation(metrics)
        scores = None if teacher is None else teacher.scores(pictured.images)
        columns = pictured.columns(policy.name, scores, progress=progress)
        kept, total = kept_object_patches(
            pictured.keep_ids(policy.name, scores, progress), pictured.coverage
        )
        of_mask, warning = {}, ""
        if total.any():
            of_mask["object_patches_kept"] = kept_object_share(kept, total)
        if policy.reads_teacher:
            if self._signals is None:
                self._signals = MaskSignals(self._recipe, pictured)
            signals, warning = self._signals.measure(teacher, scores, progress)
            of_mask |= signals
        if policy.inspect is not None:
            signals, advice = policy.inspect(pictured.views(policy.name, scores, progress))
            of_mask |= signals
            warning = advice if progress == 0 else ""  # the samples stay the same
        if of_mask:
            metrics["mask"] = of_mask
        return Evaluation(metrics, draw_figure(columns, pictured.captions), warning)


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
