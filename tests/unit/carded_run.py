"""A run folder with all that a model card tells of, written by hand beside a checkpoint."""

import json
from pathlib import Path

from PIL import Image
from written_run import write_run

from aclip.config.recipe_file import dump_recipe

SAMPLES = 8
"""Of the checkpoint that write_run writes."""
METRICS = {"num_images": 960, "num_classes": 24, "zero_shot_top1": 0.57249}
METRICS |= {f"image_to_text_r{k}": share for k, share in ((1, 0.1), (5, 0.25), (10, 0.4))}


def write_carded_run(folder, recipe, before=None, has_teacher=True, source_sizes=(90, 10)):
    """The folder, the student and the teacher of a run after 8 samples in 4 steps.

    Args:
        before: the recipe of the samples up to the fifth; None for the same.
        source_sizes: samples of each source.
    """
    run, *models = write_run(folder, recipe, has_teacher)
    if before is not None:
        (run / "recipe.yaml").write_text(dump_recipe(before))
        (run / "recipe-samples-000000000005.yaml").write_text(dump_recipe(recipe))
    (run / "recipe-samples-000000000008.yaml").write_text("of samples that come later")
    state = {
        "samples": SAMPLES,
        "step": 1,
        "stage": {"number": 2, "samples": 5, "steps": 3},
        "data": {"shards": len(source_sizes), "samples": sum(source_sizes)},
    }
    (checkpoint,) = (run / "checkpoints").glob("samples-*")
    (checkpoint / "state.json").write_text(json.dumps(state))
    shards = [f"{index}.tar {size} {index}" for index, size in enumerate(source_sizes)]
    (run / "shards.json").write_text(json.dumps(shards))
    lines = [
        {"samples": 4, "evaluation": "teacher", "metrics": METRICS | {"zero_shot_top1": 0.111}},
        {"samples": SAMPLES, "evaluation": "student", "metrics": METRICS | {"zero_shot_top1": 0.2}},
        {"samples": SAMPLES, "evaluation": "teacher", "metrics": METRICS},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "pictures").mkdir()
    Image.new("RGB", (90, 30), (200, 10, 10)).save(
        run / "pictures" / f"kept-patches-{SAMPLES:012d}.png"
    )
    return run, *models


def write_results(run: Path, private: Path, model: str = "teacher"):
    """Results of launch/evaluate.py, which name places below `private`."""
    folder = run / "evaluation" / f"samples-{SAMPLES:012d}-{model}"
    folder.mkdir(parents=True)
    entries = {
        "imagenet": {
            "title": "ImageNet",
            "metric": "top1",
            "source": f"{private}/imagenet/val",
            "prompts": "open_clip, 7 templates",
            "notes": [f"{private}/imagenet/val holds 3 folders that are empty"],
            "metrics": {"num_images": 50000, "zero_shot_top1": 0.43912, "linear_probe_top1": 0.7},
        },
        str(private / "mine"): {
            "title": "mine",
            "metric": "mean_per_class",
            "source": f"{private}/mine",
            "prompts": f"{private}/my folder/classnames.txt",
            "notes": [],
            "metrics": {
                "num_images": 12,
                "zero_shot_top1": 0.5,
                "zero_shot_mean_per_class": 0.25,
            },
        },
    }
    (folder / "results.json").write_text(json.dumps({"sets": entries}))
