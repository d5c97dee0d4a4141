"""Evaluation during training: student and teacher on the validation set, and the kept-patch
picture."""

from pathlib import Path

import numpy as np
import torch

from aclip import gather, masking
from aclip.config import Recipe
from aclip.data.augment import augment
from aclip.data.samples import Sample, SampleMaker
from aclip.data.shards import Shard, Skip, read_image_bytes, read_shard
from aclip.data.tokenizer import build_tokenizer
from aclip.data.views import center_crop, decode_image
from aclip.evaluation.suite import evaluate
from aclip.visualize import kept_patches_figure, save_png

NUM_PICTURED = 8
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
        self._pictures = run_folder / "pictures"
        self._tokenizer = build_tokenizer(recipe.model.text.context_length)
        self._samples: list[tuple[Sample, np.ndarray]] | None = None

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
            picture = self._draw(trainer)
            path = self._pictures / f"kept-patches-{trainer.samples:012d}.png"
            try:
                save_png(picture, path)
            except OSError as error:  # a full disk costs the picture, not the run
                print(f"{path} was not written ({error}); the run goes on", flush=True)
            trainer.logger.log_image("kept_patches", picture, trainer.samples)
        return results

    def _score(self, trainer, encode_image, encode_text) -> dict[str, float]:
        augmentation = self._recipe.augment
        return evaluate(
            encode_image,
            encode_text,
            self._shards,
            self._tokenizer,
            self._recipe.model.image.resolution,
            BATCH_SIZE,
            trainer.device,
            trainer.stepper.dtype,
            augmentation.mean,
            augmentation.std,
            gather,
        )

    def _draw(self, trainer) -> np.ndarray:
        """The kept patches of the same eight validation samples and views every time."""
        recipe = self._recipe
        if self._samples is None:
            self._samples = _first_samples(recipe, self._shards)
        samples = [sample for sample, _ in self._samples]

        def stack(arrays: list) -> torch.Tensor | None:
            return None if arrays[0] is None else torch.from_numpy(np.stack(arrays))

        student_views = stack([sample.views.student_views for sample in samples])
        scores = None
        if recipe.needs_teacher_view:
            teacher_views = stack([sample.views.teacher_view for sample in samples])
            pixels = augment(
                teacher_views.to(trainer.device), None, recipe.augment, trainer.stepper.dtype
            )
            scores = trainer.stepper.teacher.forward(pixels).scores.cpu()
        selection = masking.select(
            recipe.mask.policy,
            trainer.stepper.num_kept_blocks,
            recipe.mask.block_size,
            teacher_scores=scores,
            teacher_box=stack([sample.views.teacher_box for sample in samples]),
            view_boxes=stack([sample.views.student_boxes for sample in samples]),
            noise=stack([sample.mask_noise for sample in samples]),
        )
        keep_ids = masking.kept_patches(selection, trainer.stepper.grid, *student_views.shape[:2])
        return kept_patches_figure(
            np.stack([image for _, image in self._samples]),
            None if scores is None else scores.numpy(),
            student_views.numpy(),
            keep_ids.numpy(),
            trainer.stepper.grid,
            [sample.caption for sample in samples],
        )


def _first_samples(recipe: Recipe, shards: list[Shard]) -> list[tuple[Sample, np.ndarray]]:
    """The first usable samples, each with the image beside its views (3, R, R) uint8."""
    maker = SampleMaker(recipe, [shard.url for shard in shards])
    samples = []
    for index, shard in enumerate(shards):
        for position, raw in read_shard(shard):
            if len(samples) == NUM_PICTURED:
                return samples
            sample = raw if isinstance(raw, Skip) else maker.make(0, index, raw, 0, position)
            if isinstance(sample, Skip):
                continue
            image = sample.views.teacher_view
            if image is None:
                decoded = decode_image(read_image_bytes(raw))
                image = center_crop(decoded, recipe.model.image.resolution)
            samples.append((sample, image))
    return samples


def chance(metrics: dict[str, float]) -> dict[str, float]:
    """What guessing scores on the same set, for each metric of `evaluate`."""
    captions_per_image = metrics.get("num_captions", 0) / metrics["num_images"]
    expected = {}
    for name in metrics:
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
