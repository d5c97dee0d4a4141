"""launch/evaluate.py's work: what it writes and prints, and what it refuses before it starts."""

import argparse
import json

import pytest
from PIL import Image
from small_recipe import SMALL_RECIPE
from written_run import write_run

from aclip.config.recipe_file import load_recipe
from aclip.errors import ConfigError
from aclip.evaluation.evaluate import evaluate
from aclip.evaluation.results import make_rows, markdown, published_results, table
from aclip.evaluation.sets.catalog import catalog, is_retrieval
from aclip.evaluation.sets.task import Task

SMALL = ["model.image.kwargs={patch_size: 16, embed_dim: 24, depth: 1, num_heads: 2}"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ACLIP_CACHE", str(tmp_path / "cache"))
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv(name, "")  # so that what the code sets is undone
        monkeypatch.delenv(name)


def arguments_for(tmp_path, **changes):
    values = dict(
        checkpoint=str(tmp_path / "run"),
        suite=["colours"],
        data=str(tmp_path),
        download=False,
        model=None,
        recipe=None,
        slip_checkout=None,
        linear_probe=False,
        batch_size=8,
        published="aclip-25",
        output=str(tmp_path / "out"),
    )
    return argparse.Namespace(**(values | changes))


def write_colours(folder, images_per_class=10):
    for split in ("test", "train"):
        for number, name in enumerate(("red", "blue", "green")):
            (folder / split / name).mkdir(parents=True)
            for image in range(images_per_class):
                color = [10 * image] * 3
                color[number] = 250
                path = folder / split / name / f"{image}.png"
                Image.new("RGB", (70, 64), tuple(color)).save(path)


def test_results_are_printed_and_written(tmp_path, capsys):
    write_run(tmp_path / "run", load_recipe(SMALL_RECIPE, SMALL))
    write_colours(tmp_path / "colours")
    evaluate(arguments_for(tmp_path, linear_probe=True))
    output = capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    entry = results["sets"]["colours"]
    metrics = entry["metrics"]
    assert results["model"].startswith("teacher of") and results["ranks"] == 1
    assert metrics["num_images"] == 30 and metrics["num_classes"] == 3
    assert "folders" in entry["prompts"]
    # Even an untrained tower tells strong colours apart linearly.
    assert metrics["linear_probe_top1"] > 0.8
    line = next(line for line in output.splitlines() if line.startswith("colours  top-1"))
    assert line.split()[-2:] == ["30", f"{100 * metrics['zero_shot_top1']:.1f}"]
    assert "colours, images: 30 of 30" in output and "linear probe, top-1" in output
    text = (tmp_path / "out" / "results.md").read_text()
    probe = 100 * metrics["linear_probe_top1"]
    assert f"| colours | linear probe, top-1 | 30 | {probe:.1f} |" in text and "prompts: " in text
    assert not list((tmp_path / "out").glob("*tmp*"))


def test_bad_arguments_are_refused_before_the_model_is_read(tmp_path):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "run").write_text("no weights")
    write_colours(tmp_path / "no_train" / "x", 1)
    for changes, words in (
        ({"batch_size": 0}, "--batch_size is 0"),
        ({"published": "clip"}, "--published is clip.*aclip-25"),
        (
            {"output": str(tmp_path / "file" / "x"), "suite": ["no_train/x"]},
            "--output is .*can't be written",
        ),
        ({"suite": ["mnits"]}, "did you mean mnist"),
        ({"suite": ["mnist"], "data": None}, "looked for in --data"),
        ({"suite": ["no_train/x/test"], "linear_probe": True}, "--linear_probe needs"),
        ({"suite": ["no_train/x", "mnits", "dt"]}, "did you mean mnist.*did you mean dtd"),
        ({"checkpoint": str(tmp_path / "nope")}, "the checkpoint is .*nope, which does not exist"),
        (
            {"checkpoint": str(tmp_path / "no_train"), "suite": ["x"]},
            "is neither an open_clip folder nor a run, but",
        ),
        ({"recipe": "nope"}, "--recipe is nope"),
        ({"model": "teacher"}, "--model is teacher, but .* holds one model"),
    ):
        with pytest.raises(ConfigError, match=words):
            evaluate(arguments_for(tmp_path, **changes))


def paper_results(value):
    """Every set of the papers with the same score; of HatefulMemes only one class is there."""
    results = []
    for name, entry in catalog().items():
        metric = "retrieval" if is_retrieval(name) else entry.get("metric", "top1")
        scores = {"num_images": 100.0}
        if is_retrieval(name):
            for direction in ("image_to_text", "text_to_image"):
                scores |= {f"{direction}_r{k}": value for k in (1, 5, 10)}
        else:
            scores |= {"zero_shot_top1": value, "zero_shot_top5": value + 0.2}
            scores |= {"zero_shot_mean_per_class": value - 0.1}
        results.append((Task(name, entry["title"], metric, None, "", None), scores))
    return results


def test_each_set_has_its_own_metric_and_the_published_row_beside_it():
    results = paper_results(0.5)
    rows = {(row.title, row.metric): row for row in make_rows(results, "aclip-25")}
    assert rows["Food-101", "top-1"].ours == 50 and rows["Food-101", "top-1"].published == 58.3
    assert rows["Pets", "mean per class"].ours == pytest.approx(40)
    assert rows["Kinetics700", "mean of top-1 and top-5"].ours == pytest.approx((50 + 70) / 2)
    assert rows["HatefulMemes", "ROC AUC"].ours is None
    assert rows["ImageNet", "top-1"].published == 43.9
    assert rows["MS COCO 5K", "text to image R@1"].published == 23.2
    assert rows["MS COCO 5K", "text to image R@5"].published is None
    assert not any(row.title.startswith("average") for row in rows.values()), "one is undefined"
    hateful = next(scores for task, scores in results if task.name == "hateful_memes")
    hateful["zero_shot_roc_auc"] = 0.75
    average = make_rows(results, "slip-100")[-1]
    expected = (20 * 50 + 4 * 40 + 60 + 75) / 26
    assert average.title == "average of 26" and average.ours == pytest.approx(expected)
    assert average.published == published_results()["slip-100"]["average"] == 39.9


def test_without_a_published_number_there_is_no_such_column():
    task = Task("mine", "mine", "top1", None, "", None)
    rows = make_rows([(task, {"num_images": 1200.0, "zero_shot_top1": 0.25})], "aclip-25")
    assert table(rows, "aclip-25").splitlines() == [
        "set   metric  images  ours",
        "mine  top-1    1,200  25.0",
    ]
    assert "| mine | top-1 | 1,200 | 25.0 |" in markdown("Title", rows, "aclip-25", ["a fact"])
