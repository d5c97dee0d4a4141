"""The line with which the demo ends: what other masks reached in its place."""

import json

import pytest

from aclip.config.recipe_file import load_recipe
from aclip.data.demo import TRAIN_SHARD_SIZE, TRAIN_SHARDS
from aclip.planning.run_flops import RunMeter
from aclip.training import demo_comparison
from aclip.training.demo_comparison import compare_with_kept_results

CAPTION_TOKENS = 17  # the default of launch/ablate.py


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """Two seeds of each row, whose last points count, and the FLOPs of a run."""
    ends = {"attentive": (0.7, 0.74), "random": (0.6, 0.63), "none": (0.71, 0.712)}
    flops = {"attentive": 40, "random": 35, "none": 60}
    rows = [
        {
            "row": row,
            "flops": [0, 9, flops[row]],
            "outcomes": {seed: {"points": [0.04, 0.9, end]} for seed, end in enumerate(of)},
        }
        for row, of in ends.items()
    ]
    (tmp_path / "kept.json").write_text(json.dumps({"rows": rows}))
    monkeypatch.setattr(demo_comparison, "KEPT", tmp_path / "kept.json")
    return tmp_path / "kept.json"


def test_means_of_the_last_points_and_a_ratio_of_flops_are_told(kept):
    line = compare_with_kept_results(load_recipe("demo"))
    assert " 72.0% as it is," in line and "\n" not in line
    assert " 61.5% with a random mask of as many patches," in line
    assert " 71.1% without a mask, for 1.50 times the FLOPs" in line


def test_nothing_is_told_of_another_run_or_without_the_results(kept):
    assert compare_with_kept_results(load_recipe("demo", ["train.seed=1"])) == ""
    assert compare_with_kept_results(load_recipe("clip_vitb16")) == ""
    kept.unlink()
    assert compare_with_kept_results(load_recipe("demo")) == ""


def test_the_kept_results_are_of_the_demo_as_it_is():
    """As long as its runs, and with the FLOPs that its step has today."""
    rows = {row["row"]: row for row in json.loads(demo_comparison.KEPT.read_text())["rows"]}
    recipe = load_recipe("demo")
    assert recipe.train.epochs * TRAIN_SHARDS * TRAIN_SHARD_SIZE == 153_600
    assert {row["samples"][-1] for row in rows.values()} == {153_600}
    assert {len(row["outcomes"]) for row in rows.values()} == {rows["none"]["num_seeds"]}
    flops = RunMeter(recipe, CAPTION_TOKENS).run(recipe, 51_200).flops
    assert rows["attentive"]["flops"][-1] == pytest.approx(flops[-1], rel=1e-9)
    assert compare_with_kept_results(recipe)
