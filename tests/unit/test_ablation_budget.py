"""Rows at equal samples, FLOPs or time, their learning rates, and the frontier."""

import argparse
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from ablation_runs import DATA, FLOPS, POINTS, cases_of, evaluated, finished_runs, write_metrics
from small_recipe import SMALL_RECIPE

from aclip.ablation.ablate import results_so_far
from aclip.ablation.cases import Case, make_cases
from aclip.ablation.frontier import Point, frontier
from aclip.ablation.lengths import Lengths, at_quarters, in_epochs, stretched_to
from aclip.ablation.prepare import Prepared, _budget_case, _check, _with_lengths, choose
from aclip.ablation.report import make_report
from aclip.ablation.results import Page, read_results
from aclip.ablation.rows import Row
from aclip.ablation.rows_file import read_rows
from aclip.ablation.sweep import Sweep, choose_rate
from aclip.ablation.timing import seconds_per_sample
from aclip.config.recipe_file import load_recipe, stages_of
from aclip.data.synthetic import batch_of_mean_captions
from aclip.errors import ConfigError
from aclip.planning.measure_step import measure_run

SIZE = 640
TOWERS = ["model.image.kwargs={patch_size: 8, embed_dim: 24, depth: 2, num_heads: 2}"]
TOWERS += ["model.text={width: 16, heads: 2, layers: 1, context_length: 16}", "model.embed_dim=12"]
PLAIN = ("mask.policy=random", "teacher=null", "views.student=1")


def case_of(*changes, name="row") -> Case:
    row = Row(name, name, None, changes, drops_patches=False)
    (case,) = make_cases([row], SMALL_RECIPE, [*TOWERS, "train.global_batch_size=10"], [0.5])
    return case


def steps_of(case, size=SIZE):
    return [stage.num_steps(size) for stage in stages_of(case.recipe)]


def test_a_longer_run_keeps_the_proportions_of_its_stages_and_its_warm_up():
    stage = "stages=[{mask: {policy: none}, train: {samples: 30, global_batch_size: 5}}]"
    case = case_of(*PLAIN, "train.samples=240", "train.warmup_epochs=0.25", stage)
    assert steps_of(case) == [24, 6]

    def cost(case):  # a step costs 10 in the first stage and 40 in the second
        first, second = steps_of(case)
        return np.cumsum([10.0] * first + [40.0] * second)

    # 480 as it is. For 1000, 50 and 12.5 steps: 50 and 12 cost 980, of which two steps are missing.
    longer = stretched_to(case, 1000.0, cost, SIZE)
    assert steps_of(longer) == [52, 12]
    first, second = stages_of(longer.recipe)
    assert (first.train.samples, second.train.samples) == (520, 60)
    assert first.train.warmup_epochs == pytest.approx(0.25 * 52 / 24, rel=1e-5)
    assert second.train.warmup_epochs == pytest.approx(0.25 * 12 / 6, rel=1e-5)
    assert stretched_to(case, 480.0, cost, SIZE) == case


def test_a_row_whose_cost_changes_on_the_way_ends_within_a_step():
    case = case_of(*PLAIN, "train.samples=1000")

    def cost(case):  # the teacher comes after a quarter: 1 a step, then 1.6
        (steps,) = steps_of(case)
        blind = math.ceil(steps / 4)
        return np.cumsum([1.0] * blind + [1.6] * (steps - blind))

    for target in (300.0, 77.0, 1234.5):
        (steps,) = steps_of(stretched_to(case, target, cost, SIZE))
        blind = -(-steps // 4)
        assert abs(blind + 1.6 * (steps - blind) - target) <= 1.6
        # By the average of 1.45 a step.
        assert abs(steps - target / 1.45) <= 2


def flops_per_sample(case):
    batch = batch_of_mean_captions(case.recipe, 9.0, case.recipe.caption_tokens)
    return measure_run(case.recipe, batch, SIZE, modes=("none",)).total_flops


def test_at_equal_flops_a_cheap_row_sees_more_samples():
    length = "train.samples=600"
    cheap = case_of(*PLAIN, length, "mask.keep_ratio=0.25", name="cheap")
    whole = case_of(*PLAIN, length, "mask.policy=none", name="whole")
    taught = case_of("mask.warmup=0.5", length, name="taught")
    lengths = Lengths("flops", SIZE, 9.0)
    cases = lengths.equal([cheap, whole, taught], whole)
    target = 600 * flops_per_sample(whole)
    for case in cases:
        samples = 10 * steps_of(case)[0]
        assert abs(samples * flops_per_sample(case) - target) <= 11 * flops_per_sample(case)
    seen = [case.recipe.train.samples for case in cases]
    assert seen[0] > 2 * 600 and cases[1] == whole and seen[2] < 600
    # Quarters are those of the FLOPs: the teacher comes in the second half.
    placed = lengths.at_quarters(cases[2])
    samples, end = placed.points[1:], placed.points[-1]
    assert end == seen[2] and samples[0] > 0.25 * end and samples[1] > 0.5 * end
    np.testing.assert_allclose(
        np.array(placed.flops) / placed.flops[-1], np.arange(5) / 4, atol=0.02
    )


def test_equal_samples_and_equal_seconds():
    stage = "stages=[{train: {samples: 100}}]"
    staged, plain = (
        case_of(*PLAIN, stage, "train.samples=300", name="staged"),
        case_of(*PLAIN, "train.samples=600"),
    )
    equal, _ = Lengths("samples", SIZE, 9.0).equal([staged, plain], plain)
    assert steps_of(equal) == [45, 15]
    slow, fast = replace(plain, row=replace(plain.row, name="slow")), plain
    lengths = Lengths("time", SIZE, 9.0, {"slow": 0.03, "row": 0.01})
    slow, fast = lengths.equal([slow, fast], fast)
    assert (slow.recipe.train.samples, fast.recipe.train.samples) == (200, 600)
    assert steps_of(lengths.shortened(fast, 0.25)) == [15]
    assert Lengths(None, SIZE, 9.0).equal([staged], plain) == [staged]


def test_quarters_of_what_a_run_costs():
    cost = np.cumsum([1.0, 1, 1, 1, 4, 4, 4])  # 16
    case = at_quarters(case_of(*PLAIN), np.arange(10, 71, 10), 2 * cost, cost)
    assert case.points == [0, 40, 50, 60, 70]
    assert case.flops == (0, 8, 16, 24, 32)


def test_the_frontier_is_what_no_other_point_beats():
    a, b, c = Point("a", 1.0, 0.2), Point("b", 2.0, 0.4), Point("c", 3.0, 0.5)
    beaten = [
        Point("d", 2.0, 0.3),
        Point("e", 2.5, 0.4),
        Point("f", 3.0, 0.1),
        Point("g", 1.0, 0.1),
        Point("i", 1.97, 0.39),  # its quarter ended a step before b's
    ]
    twin = Point("h", 2.0, 0.4)
    assert frontier([*beaten, c, b, a, twin]) == [a, b, twin, c]
    assert frontier([]) == [] and frontier([b]) == [b]


@pytest.mark.parametrize(
    "accuracies, rate",
    [
        ({1e-3: 0.3, 5e-4: 0.2, 2e-3: 0.1}, 1e-3),
        ({5e-4: 0.3, 1e-3: 0.3, 2e-3: 0.1}, 1e-3),  # a tie goes to the middle
        ({2e-3: 0.3, 5e-4: 0.3, 1e-3: 0.1}, 5e-4),  # of two as near, the lower one
        ({1e-4: 0.1, 2e-4: 0.3, 4e-4: 0.2, 8e-4: 0.3}, 2e-4),
        ({5e-4: 0.0, 1e-3: math.nan, 2e-3: math.nan}, 5e-4),
        ({1e-3: math.nan}, None),
    ],
)
def test_the_best_rate_is_taken_and_of_equal_ones_the_middle(accuracies, rate):
    assert choose_rate(accuracies) == rate


def test_runs_get_the_rate_of_their_sweep_and_the_page_shows_it(tmp_path):
    finished_runs(tmp_path)  # of other rates, which no result may come from
    cases = [evaluated(case, FLOPS[case.row.name]) for case in cases_of(*POINTS)]
    length = ["train.samples=640", "train.global_batch_size=32"]
    sweep = Sweep([case.changed(length) for case in cases], [2e-3, 5e-4], tmp_path, {}, DATA)
    prepared = Prepared(cases, sweep, 2, tmp_path / "runs", {}, DATA)
    assert len(sweep.runs) == 4 and len({run.folder for run in sweep.runs}) == 4
    assert {run.settings["recipe"]["train"]["seed"] for run in sweep.runs} == {1000}
    assert prepared.undecided() == {"random_2x-keep50", "attentive_2x-keep50"}
    for run, reached in zip(sweep.runs, (0.25, 0.35, 0.0, 0.5), strict=True):
        run.folder.mkdir(parents=True)
        line = {"samples": 640, "evaluation": "student", "metrics": {"zero_shot_top1": reached}}
        (run.folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        run.note(finished=True, diverged=reached == 0)
    assert prepared.undecided() == set()
    runs = prepared.runs()
    assert [run.settings["recipe"]["optimizer"]["lr"] for run in runs] == [2e-3] * 4
    for run in runs:
        write_metrics(run.folder, POINTS[run.case.row.name][run.seed])
    runs[0].note(finished=True)
    page = Page("Ablation", "", results_so_far(prepared))
    text = make_report(page)["ablation.md"].decode()
    assert "| random, 2 x 50 % | 25.0 | [35.0] |" in text
    assert "| attentive, 2 x 50 % | not finite | [50.0] |" in text
    assert "1 of 4 runs are finished." in text


def test_the_page_names_the_rows_on_the_frontier(tmp_path):
    files = make_report(Page("Ablation", "", read_results(finished_runs(tmp_path))))
    lines = files["ablation.md"].decode().splitlines()
    # At 0.5 and at 1 both have run; attentive leads with 21, 33, 40 and 50 percent.
    begin = lines.index("| frontier | FLOPs | Zero-shot accuracy |")
    assert lines[begin + 2 : begin + 6] == [
        "| attentive, 2 x 50 % | 0.5 | 21.0 |",
        "| attentive, 2 x 50 % | 1 | 33.0 |",
        "| random, 2 x 50 % | 2 | 42.0 |",
        "| attentive, 2 x 50 % | 3 | 50.0 |",
    ]
    assert files["frontier.png"][1:4] == b"PNG"


def test_a_row_takes_the_method_of_a_recipe_and_nothing_else(tmp_path):
    (tmp_path / "rows.yaml").write_text("flip: {recipe: flip_vitb16, overrides: []}")
    (row,) = read_rows(str(tmp_path / "rows.yaml"))
    (case,) = make_cases(
        [row], SMALL_RECIPE, [*TOWERS, "views.scale=[0.9, 1]", "train.epochs=9"], [0.25]
    )
    own, base = load_recipe("flip_vitb16"), load_recipe(SMALL_RECIPE, TOWERS)
    recipe = case.recipe
    assert case.name == "flip" and recipe.mask == own.mask and recipe.teacher is None
    assert (recipe.model, recipe.data, recipe.optimizer) == (base.model, base.data, base.optimizer)
    assert recipe.views.student == 1 and recipe.views.scale == (0.9, 1)  # the command line counts
    assert [stage.mask.policy for stage in stages_of(recipe)] == ["random", "none"]
    # 24 epochs and one, of 64 steps of 10.
    (equal,) = Lengths("samples", SIZE, 9.0).equal(
        [case.changed(["train.global_batch_size=10"])], case_of(*PLAIN, "train.samples=5000")
    )
    assert steps_of(equal) == [480, 20]
    given = argparse.Namespace(budget=None, budget_row=None)
    with pytest.raises(ConfigError, match="row flip takes stages from flip_vitb16, .* --budget"):
        _with_lengths(given, [case], SIZE, None)


ARGUMENTS = {
    "seeds": 5,
    "processes": None,
    "caption_tokens": 17.0,
    "keep_ratio": [0.5],
    "lr_sweep": None,
    "lr_sweep_share": 1.0,
    "budget": None,
    "budget_row": None,
}


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"seeds": 1001}, "--seeds is 1001; give 1 to 1000"),
        ({"lr_sweep": [1e-3, 0.001]}, "--lr_sweep is 0.001 0.001; give each value once"),
        ({"lr_sweep": [1e-3, -1.0]}, "--lr_sweep has -1"),
        ({"lr_sweep": [1e-3], "lr_sweep_share": 0.0}, "--lr_sweep_share is 0; give a share"),
        ({"lr_sweep_share": 0.5}, "--lr_sweep_share is given without --lr_sweep"),
        ({"budget_row": "clip"}, "--budget_row is given without --budget"),
        ({"caption_tokens": 1.0}, "--caption_tokens is 1; give 2 or more"),
    ],
)
def test_wrong_arguments_are_named(changes, words):
    _check(argparse.Namespace(**ARGUMENTS))
    with pytest.raises(ConfigError, match=words):
        _check(argparse.Namespace(**ARGUMENTS | changes))


def test_an_unknown_budget_row_and_a_rate_beside_a_sweep_are_refused():
    cases = cases_of("clip", "random_1x")
    assert _budget_case("random_1x", cases) is cases[1] and _budget_case(None, cases) is cases[0]
    with pytest.raises(ConfigError, match="--budget_row is x, .* one of clip, random_1x-keep50"):
        _budget_case("x", cases)
    given = argparse.Namespace(rows=["masks"], overrides=["optimizer.lr=1"], lr_sweep=[1e-3])
    with pytest.raises(ConfigError, match="an ablation decides optimizer.lr"):
        choose(given)


BENCHMARK = """
import json, sys
recipes, out = sys.argv[1:sys.argv.index("--json")], sys.argv[sys.argv.index("--json") + 1]
assert sys.argv[sys.argv.index("--batch_size") + 1] == "5"
rows = [{"name": name, "step_seconds": 0.5 + index} for index, name in enumerate(recipes)]
rows.append({"name": recipes[0] + ", stage 1", "step_seconds": 9})
open(out, "w").write(json.dumps({"rows": rows}))
"""


def test_time_is_measured_once_for_all_rows(tmp_path):
    script = tmp_path / "benchmark.py"
    script.write_text(BENCHMARK)
    stage = "stages=[{mask: {policy: none}, train: {samples: 160}}]"
    cases = [case_of(*PLAIN, name="a"), case_of(*PLAIN, "train.samples=320", stage, name="b")]
    expected = {"a": 0.1, "b": 0.3}  # 0.5 and 1.5 s for 5 images
    given = (tmp_path, script, 5, SIZE, {"ACLIP_UNUSED": ""})
    assert seconds_per_sample(cases, *given) == expected
    script.write_text("raise SystemExit(1)")
    assert seconds_per_sample(cases, *given) == expected
    with pytest.raises(ConfigError, match="holds no time of row c, which came later"):
        seconds_per_sample([case_of(*PLAIN, name="c")], *given)
    (tmp_path / "seconds.json").unlink()
    with pytest.raises(ConfigError, match="could not be timed .status 1., see|status 1"):
        seconds_per_sample(cases, *given)
    timed = load_recipe(str(tmp_path / "timing" / "b.yaml"))
    assert timed == in_epochs(cases[1], SIZE).model_copy(update={"data": timed.data})
    assert [stage.train.epochs for stage in stages_of(timed)] == [0.5, 0.25]
    assert [stage.train.samples for stage in stages_of(timed)] == [None, None]
