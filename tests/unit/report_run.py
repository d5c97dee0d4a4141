"""A run folder written by hand: a few lines of metrics.jsonl, a recipe and pictures."""

import json

from PIL import Image
from small_recipe import SMALL_RECIPE

from aclip.config.recipe_file import dump_recipe, load_recipe

TERMS = {"loss": 2.34567, "contrastive": 1.5, "byol": None}


def log_step(step):
    return {
        "samples": step * 1000,
        "step": step,
        "terms": {name: value and value / step for name, value in TERMS.items()},
        "memory_gib": 1.25 * step,
        "learning_rate": 3e-4 / step,
        "momentum": 1 - 0.004 / step,
        "skipped": {"no_image": 7 * step},
        "images_per_second": 1234.56,
        "data_wait_percent": 3.2,
    }


def evaluation(samples, model, top1):
    metrics = {"num_images": 960, "zero_shot_top1": top1, "image_to_text_r1": top1 / 2}
    return {"samples": samples, "evaluation": model, "metrics": metrics}


LINES = [
    evaluation(0, "student", 0.04321),
    *(log_step(step) for step in range(1, 4)),
    evaluation(3000, "student", 0.5),
    evaluation(3000, "teacher", 0.61239),
]


def write_run(folder, overrides=(), lines=LINES):
    folder.mkdir()
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + '{"samples": 4000, "te')  # killed while writing
    (folder / "recipe.yaml").write_text(dump_recipe(load_recipe(SMALL_RECIPE, list(overrides))))
    (folder / "pictures").mkdir()
    for samples in (0, 3000, 9000):  # the last is left from a run that began anew
        path = folder / "pictures" / f"kept-patches-{samples:012d}.png"
        Image.new("RGB", (1000, 300), (samples % 251, 90, 90)).save(path)
    return folder
