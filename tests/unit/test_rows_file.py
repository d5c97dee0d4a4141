"""Rows of one's own: what a file of them gives, and what is wrong with one that gives none."""

import argparse
from pathlib import Path

import pytest
from ablation_runs import DATA, evaluated, write_metrics
from small_recipe import SMALL_RECIPE

import aclip.ablation
from aclip.ablation.cases import make_cases
from aclip.ablation.prepare import check_word_counts, choose
from aclip.ablation.report import write_report
from aclip.ablation.results import Page, read_results
from aclip.ablation.rows_file import read_rows
from aclip.ablation.runs import make_runs
from aclip.data.shards.listing import Shard
from aclip.errors import ConfigError

ROOM = Path(aclip.ablation.__file__).parent
ROWS = """
cold: {label: "cold, {keep} %", overrides: [mask.policy=attentive]}
warm: {overrides: [mask.policy=attentive, mask.warmup=0.25], against: cold}
whole:
  drops_patches: false
  overrides: [mask.policy=none, mask.keep_ratio=1, views.student=1, teacher=null]
"""


@pytest.fixture
def write_rows(tmp_path):
    def write(text):
        (tmp_path / "rows.yaml").write_text(text)
        return str(tmp_path / "rows.yaml")

    return write


def test_rows_of_a_file_are_trained_at_each_ratio_and_compared(write_rows, tmp_path):
    cases = make_cases(read_rows(write_rows(ROWS)), SMALL_RECIPE, ["train.epochs=2"], [0.5, 0.25])
    names = ["cold-keep50", "cold-keep25", "warm-keep50", "warm-keep25", "whole"]
    assert [case.name for case in cases] == names
    assert [case.recipe.mask.warmup for case in cases] == [0, 0, 0.25, 0.25, 0]
    assert [case.recipe.mask.keep_ratio for case in cases] == [0.5, 0.25, 0.5, 0.25, 1]
    assert {case.recipe.train.epochs for case in cases} == {2}
    runs = make_runs([evaluated(cases[0]), evaluated(cases[2])], 2, tmp_path, {}, DATA)
    for run in runs:
        last = 0.5 + 0.1 * (run.case.row.name == "warm") + 0.04 * run.seed
        write_metrics(run.folder, [0.1, 0.2, 0.3, 0.4, last])
        run.note(finished=True)
    write_report(Page("Rows", "", read_results(runs)), tmp_path)
    lines = (tmp_path / "ablation.md").read_text().splitlines()
    accuracy = "20.0 ± 0.0 | 30.0 ± 0.0 | 40.0 ± 0.0 | 62.0 ± 2.0"
    assert f"| warm | {accuracy} |  | 4,000 | 1.00 | 1.00 |  | 2 |" in lines
    assert "| warm - cold, 50 % | +0.0 ± 0.0 | +0.0 ± 0.0 | +0.0 ± 0.0 | +10.0 ± 0.0 |" in lines


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "holds no rows"),
        ("- a", "holds no rows"),
        ("a: [", "can't be read"),
        ("a: {label: x}", r"a.overrides in .* Field required"),
        ("a: {overrides: mask.policy=none}", "a.overrides in .* is 'mask.policy=none'"),
        ("a: {overrides: [], color: red}", "a.color in .* is 'red'"),
        ("a/b: {overrides: []}", "has a row 'a/b', but it names a folder"),
        ("a: {overrides: [], against: b}\nc: {overrides: []}", "a in .* is against b.*one of c"),
        ("a: {overrides: [], against: a}", "a in .* is against a, .*no other row.*leave it out"),
    ],
)
def test_a_wrong_file_is_refused_in_a_sentence(write_rows, text, words):
    with pytest.raises(ConfigError, match=words):
        read_rows(write_rows(text))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="none.yaml, which can't be read .No such file"):
        read_rows(str(tmp_path / "none.yaml"))


@pytest.mark.parametrize(
    "text, override, words",
    [
        (
            ROWS,
            "mask.warmup=0.1",
            "override is mask.warmup=0.1, but an ablation decides mask.warmup",
        ),
        ("a: {overrides: [train.epochs=3]}", "train.seed=1", "decides train.seed"),
        ("a: {overrides: [train.epochs=3]}", "", "sets train.epochs, which is equal in all rows"),
        ("a: {overrides: [train.seed=3]}", "", "sets train.seed, which is equal in all rows"),
    ],
)
def test_keys_of_rows_and_of_the_command_line_are_apart(write_rows, text, override, words):
    arguments = argparse.Namespace(
        rows=[write_rows(text)], overrides=[override] if override else [], lr_sweep=None
    )
    with pytest.raises(ConfigError, match=words):
        choose(arguments)


def test_a_file_of_rows_comes_first_and_alone(write_rows):
    for rows, words in (
        (["masks", write_rows(ROWS)], "give one file of rows first"),
        ([write_rows(ROWS), "masks"], "names masks, but .* has the rows cold, warm, whole"),
    ):
        with pytest.raises(ConfigError, match=words):
            choose(argparse.Namespace(rows=rows, overrides=[], lr_sweep=None))


def test_braces_of_a_row_are_yamls_and_not_a_place_to_fill_in(write_rows):
    text = 'a: {label: "{a} of {keep} %", overrides: ["views={student: 1, scale: [0.7, 1]}"]}'
    (case,) = make_cases(read_rows(write_rows(text)), SMALL_RECIPE, [], [0.5])
    assert case.label == "{a} of 50 %" and case.recipe.views.scale == (0.7, 1)


def test_some_rows_of_a_file_can_be_chosen_with_those_that_they_are_compared_with(write_rows):
    path = write_rows("a: {overrides: []}\nb: {overrides: [], against: a}\nc: {overrides: []}")
    assert [row.name for row in read_rows(path, ["c", "a"])] == ["a", "c"]
    assert [row.name for row in read_rows(path, ["b", "a"])] == ["a", "b"]
    with pytest.raises(ConfigError, match="names d, but .* has the rows a, b, c"):
        read_rows(path, ["a", "d"])
    with pytest.raises(ConfigError, match="names b, which .* compares with a; name that too"):
        read_rows(path, ["b", "c"])


def test_counts_of_words_that_a_row_needs_are_missed_before_the_first_run(tmp_path, write_rows):
    stage = "{train: {epochs: 1}, text: {tokens: 8, reduce: frequency}}"
    text = f"plain: {{overrides: []}}\nshort: {{overrides: ['stages=[{stage}]']}}"
    own = ["data.train=x.tar", "data.val=x.tar"]
    cases = make_cases(read_rows(write_rows(text)), SMALL_RECIPE, own, [0.5])
    shards = [Shard(str(tmp_path / "x.tar"), 9)]
    with pytest.raises(ConfigError, match="there is no word_counts.json in .*; make it with"):
        check_word_counts(cases, shards)
    (tmp_path / "word_counts.json").write_text('{"words": {"cat": 7}}')
    check_word_counts(cases, shards)


@pytest.mark.parametrize("path", sorted(ROOM.glob("*.yaml")), ids=lambda path: path.stem)
def test_rows_that_ship_fit_their_recipe_and_no_two_are_the_same(path):
    base = "aclip_vits16" if path.stem == "field_224" else "demo"
    cases = make_cases(read_rows(str(path)), base, [], [0.5])
    assert len({case.recipe.model_dump_json() for case in cases}) == len(cases) > 1
