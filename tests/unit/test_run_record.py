"""What a run was made of stays readable through all of its starts."""

import json

import pytest
from small_recipe import SMALL_RECIPE

from aclip.config.recipe_file import load_recipe
from aclip.data.shards.listing import Shard
from aclip.run_folder.layout import latest_record
from aclip.training import run_record
from aclip.training.run_record import record_run
from aclip.weights.checkpoint_weights import load_checkpoint_weights

SHARDS = [Shard("/data/00000.tar", 10), Shard("/data/00001.tar", 12)]


class InitReport:
    def to_dict(self):
        return {"loaded": 3}


@pytest.fixture
def start(tmp_path, monkeypatch):
    """start(samples, *overrides): what a start that continues there records."""

    def record(samples, *overrides, stage=2, commit="abc", init_report=None):
        monkeypatch.setattr(run_record, "_git_commit", lambda: commit)
        recipe = load_recipe(SMALL_RECIPE, list(overrides))
        ds_values = {"zero_optimization": {"stage": stage}}
        record_run(tmp_path, recipe, ds_values, init_report, SHARDS, samples)
        return recipe

    return record


def names(folder):
    return {path.name for path in folder.iterdir()}


def read(path):
    return load_recipe(str(path))


FIRST = {"recipe.yaml", "ds_config.json", "environment.json", "shards.json"}


def test_start_that_changes_nothing_adds_nothing(start, tmp_path):
    first = start(0)
    start(64)
    changed = start(128, "optimizer.lr=0.1")
    start(192, "optimizer.lr=0.1")
    start(256, "optimizer.lr=0.1")
    assert names(tmp_path) == FIRST | {"recipe-samples-000000000128.yaml"}
    assert read(tmp_path / "recipe.yaml") == first
    assert read(latest_record(tmp_path, "recipe.yaml")) == changed
    assert json.loads((tmp_path / "shards.json").read_text()) == ["00000 10 0", "00001 12 0"]
    # Back to what it was: that, too, is a change.
    start(320)
    assert read(latest_record(tmp_path, "recipe.yaml")) == first
    assert latest_record(tmp_path, "recipe.yaml").name == "recipe-samples-000000000320.yaml"


def test_ds_config_and_environment_are_recorded_alike(start, tmp_path):
    start(0)
    start(64, stage=3)
    start(128, stage=3, commit="def")
    added = {"ds_config-samples-000000000064.json", "environment-samples-000000000128.json"}
    assert names(tmp_path) == FIRST | added
    stage = json.loads(latest_record(tmp_path, "ds_config.json").read_text())["zero_optimization"]
    assert stage == {"stage": 3}
    assert json.loads((tmp_path / "environment.json").read_text())["git_commit"] == "abc"


def test_start_from_an_older_checkpoint_takes_the_place_of_what_followed_it(start, tmp_path):
    start(0)
    start(64, "optimizer.lr=0.1")
    start(128, "optimizer.lr=0.2")
    start(64, "optimizer.lr=0.3")
    assert names(tmp_path) == FIRST | {"recipe-samples-000000000064.yaml"}
    assert read(latest_record(tmp_path, "recipe.yaml")).optimizer.lr == 0.3


def test_new_run_in_the_same_folder_begins_its_records_anew(start, tmp_path):
    start(0, init_report=InitReport())
    assert names(tmp_path) == FIRST | {"init_report.json"}
    start(64, "optimizer.lr=0.1", stage=3)
    assert json.loads((tmp_path / "init_report.json").read_text()) == {"loaded": 3}
    (tmp_path / "recipe-samples-of-mine.yaml").touch()
    again = start(0, "optimizer.lr=0.2")
    assert names(tmp_path) == FIRST | {"recipe-samples-of-mine.yaml"}
    assert read(latest_record(tmp_path, "recipe.yaml")) == again


def test_folder_without_records_gets_the_first_ones_where_it_continues(start, tmp_path):
    recipe = start(64)
    assert names(tmp_path) == FIRST
    assert read(tmp_path / "recipe.yaml") == recipe


def test_checkpoint_comes_with_its_runs_latest_recipe(write_run):
    run, *_ = write_run(load_recipe(SMALL_RECIPE))
    later = load_recipe(SMALL_RECIPE, ["mask.keep_ratio=0.25"])
    record_run(run, later, {}, None, SHARDS, 8)
    assert read(run / "recipe.yaml").mask.keep_ratio == 0.5
    assert load_checkpoint_weights(str(run), None).recipe.mask.keep_ratio == 0.25
