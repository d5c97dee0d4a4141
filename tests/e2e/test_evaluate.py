"""launch/evaluate.py under the deepspeed launcher says what it says alone."""

import argparse
import json
import shutil
from pathlib import Path

import pytest
from small_recipe import SMALL_RECIPE
from written_run import write_run

pytestmark = pytest.mark.e2e

SMALL = ["model.image.kwargs={patch_size: 16, embed_dim: 24, depth: 1, num_heads: 2}"]


def test_two_ranks_print_and_write_what_one_does(launcher, tmp_path, monkeypatch):
    from aclip.config.recipe_file import load_recipe
    from aclip.evaluation.evaluate import evaluate

    run, *_ = write_run(tmp_path / "run", load_recipe(SMALL_RECIPE, SMALL))
    # 480 images in calls of at most 90 leave a last one that is not full, and the captions too.
    arguments = [str(run), "--suite", "scenes", "--batch_size", "90"]
    result = launcher.run(*arguments, "--output", str(tmp_path / "2"), script="evaluate.py")
    assert result.status == 0, result.output
    for words in ("evaluating the teacher of", "scenes, images", "built-in scenes", "R@10"):
        assert words in result.output
    assert result.output.count("written: ") == 1, "one rank reports"
    assert "classnames.txt" in result.output, "and whose prompts were used"

    shutil.rmtree(Path(launcher.env["ACLIP_CACHE"]) / "class_embeds")
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that what the code sets is undone
        monkeypatch.delenv(name)
    monkeypatch.setenv("ACLIP_CACHE", launcher.env["ACLIP_CACHE"])
    values = dict(checkpoint=str(run), suite=["scenes"], batch_size=90, output=str(tmp_path / "1"))
    values |= dict(data=None, download=False, model=None, recipe=None, slip_checkout=None)
    evaluate(argparse.Namespace(**values, linear_probe=False, published="aclip-25"))
    one, two = (json.loads((tmp_path / n / "results.json").read_text()) for n in "12")
    assert (one.pop("ranks"), two.pop("ranks")) == (1, 2)
    assert one == two
    metrics = one["sets"]["scenes"]["metrics"]
    assert metrics["num_images"] == 480 and metrics["num_captions"] == 480
    text = (tmp_path / "1" / "results.md").read_text()
    assert f"| {100 * metrics['zero_shot_top1']:.1f} |" in text and text.startswith("# Evaluation")
