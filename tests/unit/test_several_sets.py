"""Evaluation sets do not cost each other their results, nor do models that share a folder."""

import errno
import json
import os
import time
from pathlib import Path

import pytest
from evaluation_folders import png, write_tar
from small_recipe import SMALL_RECIPE
from test_evaluate import SMALL, _own_cache, arguments_for, write_colours  # noqa: F401
from written_run import write_run

from aclip import files
from aclip.config.recipe_file import load_recipe
from aclip.errors import ConfigError
from aclip.evaluation import evaluate_sets
from aclip.evaluation.evaluate import evaluate
from aclip.evaluation.sets.catalog import find_tasks
from aclip.lock import claim, release


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("model") / "run", load_recipe(SMALL_RECIPE, SMALL))[0]


@pytest.fixture
def arguments(run, tmp_path):
    """arguments(**changes): two good sets around three that can't be scored."""
    write_colours(tmp_path / "first", 1)
    write_colours(tmp_path / "last", 2)
    write_tar(tmp_path / "broken" / "0.tar", [{"png": b"no picture", "txt": b"a"}] * 3)
    write_tar(tmp_path / "no_words" / "0.tar", [{"png": png(1), "cls": b"0"}])
    write_tar(tmp_path / "beyond" / "0.tar", [{"png": png(1), "cls": b"2"}])
    (tmp_path / "beyond" / "classnames.txt").write_text("a\nb")
    suite = ["first", "broken", "no_words", "beyond", "last"]
    values = {"checkpoint": str(run), "suite": suite}
    return lambda **changes: arguments_for(tmp_path, **(values | changes))


def read(tmp_path):
    return json.loads((tmp_path / "out" / "results.json").read_text())


def test_a_bad_set_costs_that_set(arguments, tmp_path, capsys):
    assert evaluate(arguments()) == 1
    output = capsys.readouterr().out
    results = read(tmp_path)
    assert list(results["sets"]) == ["first", "last"]
    assert results["sets"]["last"]["metrics"]["num_images"] == 6
    failed = {
        "broken": "holds no usable sample, 3 are skipped (unreadable_image 3)",
        "no_words": "whose 1 usable samples hold neither captions nor labels with names",
        "beyond": "names 2 classes, but a sample's .cls is 2",
    }
    assert results["failed"].keys() == failed.keys()
    for name, words in failed.items():
        assert words in results["failed"][name]
        assert f"error: {name} was not evaluated: " in output
        assert f"- not evaluated: {name}: " in (tmp_path / "out" / "results.md").read_text()
    assert output.index("first  top-1") < output.index("error: broken")
    assert output.index("error: beyond") < output.index("last  top-1")
    assert output.rindex("error: ") < output.index("all results:")
    assert max(map(len, output.splitlines())) < 300


def test_what_a_set_gave_is_written_before_the_next_one_begins(arguments, tmp_path, monkeypatch):
    seen = []
    score = evaluate_sets.evaluate_set

    def look(towers, dataset, *rest):
        if seen and "first" not in read(tmp_path)["sets"]:
            raise AssertionError("the first set's result is not there")
        seen.append(dataset.name)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return score(towers, dataset, *rest)

    monkeypatch.setattr(evaluate_sets, "evaluate_set", look)
    with pytest.raises(KeyboardInterrupt):
        evaluate(arguments())
    assert list(read(tmp_path)["sets"]) == ["first"]


def test_an_error_that_nobody_foresaw_costs_its_set_alone(arguments, tmp_path, monkeypatch, capsys):
    score = evaluate_sets.evaluate_set

    def fail(towers, dataset, *rest):
        if "first" in dataset.name:
            raise RuntimeError("out of memory")
        return score(towers, dataset, *rest)

    monkeypatch.setattr(evaluate_sets, "evaluate_set", fail)
    assert evaluate(arguments(suite=["first", "last"])) == 1
    assert read(tmp_path)["failed"] == {"first": "RuntimeError: out of memory"}
    assert list(read(tmp_path)["sets"]) == ["last"]
    assert "Traceback" in capsys.readouterr().err


def test_a_probe_that_fails_costs_no_zero_shot(arguments, tmp_path, capsys):
    for image in (tmp_path / "first" / "train").glob("*/*"):
        image.write_bytes(b"no picture")
    assert evaluate(arguments(suite=["first", "last"], linear_probe=True)) == 1
    results = read(tmp_path)
    assert "zero_shot_top1" in results["sets"]["first"]["metrics"]
    assert "linear_probe_top1" in results["sets"]["last"]["metrics"]
    assert "3 samples but none with a label" in results["failed"]["first, linear probe"]


def test_a_training_split_of_other_classes_is_refused_before_the_model_is_read(arguments, tmp_path):
    (tmp_path / "last" / "train" / "violet").mkdir()
    with pytest.raises(ConfigError, match="last/test has no folder violet"):
        evaluate(arguments(suite=["first", "last"], linear_probe=True))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", ["results.json", "results.md", "safetensors"])
def test_a_file_that_cant_be_written_costs_that_file(
    file, arguments, tmp_path, monkeypatch, capsys
):
    replace = os.replace

    def full(source, target):
        if str(target).endswith(file):
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", full)
    assert evaluate(arguments(suite=["first", "last"])) == 5
    output = capsys.readouterr().out
    assert "first  top-1" in output and "last   top-1" in output, "printed all the same"
    assert output.count("No space left on device); make room there") == 2, "when it is, at the end"
    written = {path.name for path in (tmp_path / "out").glob("results.*")}
    assert written == {"results.json", "results.md"} - {file}


def test_a_runs_results_lie_in_its_folder_by_checkpoint_and_model(run, arguments):
    for model in ("student", "teacher"):
        assert evaluate(arguments(suite=["first"], model=model, output=None)) == 0
    found = sorted(path.parent.name for path in (run / "evaluation").glob("*/results.json"))
    checkpoint = next((run / "checkpoints").glob("samples-*")).name
    assert found == [f"{checkpoint}-student", f"{checkpoint}-teacher"]


def test_another_models_results_are_not_replaced(arguments, tmp_path):
    assert evaluate(arguments(suite=["first"], model="student")) == 0
    before = read(tmp_path)
    with pytest.raises(ConfigError, match="results.json holds results of the student of .*, which"):
        evaluate(arguments(suite=["last"], model="teacher"))
    assert read(tmp_path) == before
    (tmp_path / "out" / "results.json").write_text("[1, 2]")
    with pytest.raises(ConfigError, match="holds something else than results of an evaluation"):
        evaluate(arguments(suite=["last"]))


def test_the_same_models_results_of_other_sets_stay(arguments, tmp_path, capsys):
    for suite in (["first"], ["last"], ["first"]):
        assert evaluate(arguments(suite=suite)) == 0
    assert list(read(tmp_path)["sets"]) == ["first", "last"]
    output = capsys.readouterr().out
    assert output.count("it takes the place of an earlier result") == 1
    text = (tmp_path / "out" / "results.md").read_text()
    assert "| first | top-1 | 3 |" in text and "| last | top-1 | 6 |" in text


def test_two_evaluations_at_a_time_need_two_folders(arguments, tmp_path, monkeypatch):
    if os.fork() == 0:  # a lock is the process's
        try:
            (tmp_path / "out").mkdir()
            claim(tmp_path / "out", "--output", "an evaluation")
            (tmp_path / "claimed").touch()
            while not (tmp_path / "done").exists():
                time.sleep(0.01)
        finally:
            os._exit(0)
    while not (tmp_path / "claimed").exists():
        time.sleep(0.01)
    try:
        with pytest.raises(ConfigError, match="--output is .*out, which an evaluation .process"):
            evaluate(arguments(suite=["first"]))
    finally:
        (tmp_path / "done").touch()
        os.wait()
    assert evaluate(arguments(suite=["first"])) == 0
    release(Path(tmp_path / "out"))


def test_one_image_one_class_and_one_caption_are_scored_with_a_word(arguments, tmp_path, capsys):
    write_tar(tmp_path / "one" / "0.tar", [{"png": png(1), "cls": b"0", "txt": b"a"}])
    (tmp_path / "one" / "classnames.txt").write_text("thing")
    assert evaluate(arguments(suite=["one"])) == 0
    metrics = read(tmp_path)["sets"]["one"]["metrics"]
    assert metrics["zero_shot_top1"] == metrics["text_to_image_r1"] == 1.0
    output = capsys.readouterr().out
    assert "one: there is one class alone" in output and "one: there is one image alone" in output


def test_nothing_at_all_is_refused(arguments, tmp_path):
    (tmp_path / "empty").mkdir()
    write_tar(tmp_path / "no_sample" / "0.tar", [])
    (tmp_path / "no_image" / "cat").mkdir(parents=True)
    words = "empty, a folder of no known layout .it is empty.*no shard holds a sample.*"
    words += "no_image holds no image in a folder of its class, of which there are 1 .cat"
    with pytest.raises(ConfigError, match=words):
        evaluate(arguments(suite=["empty", "no_sample", "no_image"]))


def test_sets_of_the_paper_that_are_not_there_are_counted_aloud(run, tmp_path, capsys, monkeypatch):
    write_colours(tmp_path / "food", 1)
    missing = ["cars is not in it: put it there", "dtd is not in it: put it there"]
    found = find_tasks(["food"], tmp_path)[0], missing
    monkeypatch.setattr("aclip.evaluation.evaluate.find_tasks", lambda *_: found)
    assert evaluate(arguments_for(tmp_path, checkpoint=str(run))) == 0
    output = capsys.readouterr().out
    assert f"--data is {tmp_path}, which lacks 2 of the paper's sets; they are left out" in output
    assert "px on 1 set, 1 rank\n" in output
    assert "- left out: cars is not in it" in (tmp_path / "out" / "results.md").read_text()
