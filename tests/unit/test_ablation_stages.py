"""Rows with stages: what they may change, where they are evaluated, what a run of them costs."""

import json

import numpy as np
import pytest
from ablation_runs import DATA, cases_of
from small_recipe import SMALL_RECIPE

from aclip.ablation.cases import make_cases
from aclip.ablation.lengths import at_quarters
from aclip.ablation.prepare import choose
from aclip.ablation.results import read_results
from aclip.ablation.rows import Row
from aclip.ablation.runs import make_runs
from aclip.config.recipe_file import load_recipe
from aclip.data.synthetic import batch_of_mean_captions
from aclip.errors import ConfigError
from aclip.planning.measure_step import measure_step
from aclip.planning.run_flops import RunMeter
from aclip.planning.step_kinds import step_kinds

TOWERS = ["model.image.kwargs={patch_size: 8, embed_dim: 24, depth: 2, num_heads: 2}"]
TOWERS += ["model.text={width: 16, heads: 2, layers: 1, context_length: 16}", "model.embed_dim=12"]
PLAIN = ["mask.policy=random", "mask.keep_ratio=0.5", "teacher=null", "views.student=1"]
STAGE = (
    "stages=[{mask: {policy: none}, train: {samples: 160, global_batch_size: 8}, "
    "model: {image: {resolution: 64}}}]"
)
SMALL_FIRST = Row("small", "small", None, ("model.image.resolution=32", *PLAIN, STAGE), False)


def small_first(*more):
    return Row("small", "small", None, (*SMALL_FIRST.overrides, *more), drops_patches=False)


def case_of(row, *overrides):
    (case,) = make_cases([row], SMALL_RECIPE, [*TOWERS, *overrides], [0.5])
    return case


def test_quarters_are_those_of_the_samples_of_all_stages(tmp_path):
    case = case_of(SMALL_FIRST, "train.global_batch_size=16", "train.samples=80")
    # Five steps of 16, then twenty of 8: 240 samples, of which quarters are 60, 120, 180, 240.
    samples = np.array([*range(16, 81, 16), *range(88, 241, 8)])
    case = at_quarters(case, samples, np.arange(1.0, 26.0), samples)
    assert case.points == [0, 64, 120, 184, 240]
    assert case.flops == (0, 4, 10, 18, 25)
    run = make_runs([case], 1, tmp_path, {}, DATA)[0]
    write_lines(run.folder, case.points, rates={16: 1, 32: 10, 80: 10, 160: 40, 240: 20})
    run.note(finished=True)
    (result,) = read_results([run])
    # The evaluation at the change of the stages is no quarter.
    assert result.outcomes[0].points == [0.0, 0.64, 1.2, 1.84, 2.4]
    assert result.seconds() == 80 / 10 + 160 / 30


def write_lines(folder, points, rates):
    folder.mkdir(parents=True)
    lines = [
        {"samples": each, "evaluation": "student", "metrics": {"zero_shot_top1": each / 100}}
        for each in sorted({*points, 80})
    ]
    lines += [
        {"samples": samples, "step": 1, "terms": {}, "images_per_second": rate}
        for samples, rate in rates.items()
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def flops_of(recipe, progress, taught=True):
    """FLOPs of a sample in one step that is measured by itself."""
    batch = batch_of_mean_captions(recipe, 9.0, recipe.caption_tokens)
    kinds = step_kinds(recipe, batch, 64)
    batch = next(k.batch for k in kinds if (k.batch.teacher_view is not None) == taught)
    return measure_step(recipe, batch, modes=("none",), progress=progress).total_flops


def test_flops_of_a_run_are_those_of_its_steps_stage_by_stage():
    case = case_of(SMALL_FIRST, "train.global_batch_size=16", "train.samples=80")
    run = RunMeter(case.recipe, 9.0).run(case.recipe, 64)
    assert list(run.samples[[0, 4, 5, 24]]) == [16, 80, 88, 240]
    small = flops_of(case.recipe, 1.0, taught=False)
    whole = [*TOWERS, *PLAIN, "mask.policy=none", "train.global_batch_size=8"]
    large = flops_of(load_recipe(SMALL_RECIPE, whole), 1.0, taught=False)
    assert run.total == pytest.approx(80 * small + 160 * large, rel=1e-9)
    assert (run.after(0), run.after(80)) == (0, pytest.approx(80 * small, rel=1e-9))
    assert run.after(87) == run.after(80)  # the step that ends with 88 is not done


def test_flops_follow_the_teacher_and_the_kept_blocks_through_the_run():
    # A warm-up of a quarter, 2 of 8 steps, in which the teacher does not run.
    overrides = [*TOWERS, "train.global_batch_size=16", "train.samples=128", "mask.warmup=0.25"]
    recipe = load_recipe(SMALL_RECIPE, overrides)
    run = RunMeter(recipe, 9.0).run(recipe, 64)
    blind, taught = flops_of(recipe, 0.0, taught=False), flops_of(recipe, 1.0)
    assert taught > 1.2 * blind
    expected = 16 * np.cumsum([blind, blind, *[taught] * 6])
    np.testing.assert_allclose(run.flops, expected, rtol=1e-9)
    # From 4 to 16 blocks of 16, another number in each of the steps.
    change = ["mask.policy=random", "teacher=null", "mask.keep_ratio=0.25", "mask.keep_ratio_end=1"]
    recipe = load_recipe(SMALL_RECIPE, [*overrides[:-1], *change])
    run = RunMeter(recipe, 9.0).run(recipe, 64)
    each = [flops_of(recipe, step / 8, taught=False) for step in range(8)]
    assert len(set(each)) == 8
    np.testing.assert_allclose(run.flops, 16 * np.cumsum(each), rtol=1e-9)


def test_what_is_equal_in_all_rows_is_refused_in_a_stage_too():
    for change, words in (
        ("stages=[{train: {epochs: 1}, data: {train: /x.tar}}]", "small sets data.train to '/x"),
        ("stages=[{train: {epochs: 1}, data: {val: /x.tar}}]", "small sets data.val to '/x.tar'"),
        ("model.embed_dim=8", "small sets model.embed_dim to 8, but towers"),
        ("model.text.width=32", "small sets model.text.width to 32, but towers"),
    ):
        with pytest.raises(ConfigError, match=words):
            case_of(small_first(change))


def test_a_row_with_stages_may_say_how_long_its_first_stage_is(tmp_path, monkeypatch):
    rows = tmp_path / "rows.yaml"
    rows.write_text(
        "short: {overrides: ['stages=[{train: {epochs: 1}}]', train.epochs=2]}\n"
        "plain: {overrides: [train.epochs=2]}\n"
    )
    given = type("Arguments", (), {"rows": [str(rows), "short"], "overrides": [], "lr_sweep": None})
    (row,) = choose(given)
    assert case_of(row).recipe.train.epochs == 2
    given.rows = [str(rows), "plain"]
    with pytest.raises(ConfigError, match="row plain sets train.epochs, which is equal"):
        choose(given)
    given.rows, given.overrides = [str(rows), "short"], ["stages.0.train.epochs=3"]
    with pytest.raises(ConfigError, match=r"an ablation decides stages.0.train.epochs"):
        choose(given)


def test_stages_of_all_rows_can_be_given_on_the_command_line():
    (case,) = cases_of("clip", overrides=["stages=[{train: {epochs: 1}}]"])
    assert len(case.recipe.stages) == 1
