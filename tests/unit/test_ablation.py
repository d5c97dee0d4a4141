"""Ablations: what each row changes, which runs are started, and the figures of finished ones."""

import re
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from ablation_runs import DATA, POINTS, cases_of, finished_runs, write_metrics
from processes import still_running
from small_recipe import SMALL_RECIPE

from aclip.ablation.cases import make_cases
from aclip.ablation.report import write_report
from aclip.ablation.results import Mean, Page, difference, page_of_json, read_results
from aclip.ablation.rows import choose_rows, decided_by
from aclip.ablation.runner import Runner
from aclip.ablation.runs import make_run, make_runs
from aclip.errors import ConfigError


@pytest.mark.parametrize(
    "base, full",
    [
        ("demo", 64),
        # Bases that are methods of their own leave nothing of it in the rows.
        ("aclip_eff_vitb16", 224),
        ("maskclip_vitb16", 224),
    ],
)
def test_every_row_is_its_method(base, full):
    rows = choose_rows(["masks", "systems"])
    cases = make_cases(rows, base, [], [0.5, 0.25])
    seen = {
        case.name: (
            case.recipe.mask.policy,
            case.recipe.mask.keep_ratio,
            case.recipe.views.student,
            case.recipe.views.ssl,
            case.recipe.teacher and case.recipe.teacher.resolution,
            case.recipe.loss.simclr,
            case.recipe.loss.byol,
            case.recipe.loss.distill,
            case.recipe.loss.mlm,
        )
        for case in cases
    }
    masked = {
        "random_1x": ("random", 1, 0, None, 0, 0),
        "random_2x": ("random", 2, 0, None, 0, 0),
        "attentive_1x": ("attentive", 1, 0, full, 0, 0),
        "attentive_2x": ("attentive", 2, 0, full, 0, 0),
        "inverse_2x": ("inverse", 2, 0, full, 0, 0),
        "aclip": ("attentive", 2, 0, full, 1, 2),
        "aclip_eff": ("attentive", 2, 0, full // 2, 1, 2),
    }
    expected = {
        "clip": ("none", 1, 1, 0, None, 0, 0, 0, 0),
        "slip": ("none", 1, 1, 2, None, 1, 0, 0, 0),
        "maskclip": ("none", 1, 1, 0, full, 0, 0, 0.05, 0.05),
    }
    for name, (policy, *rest) in masked.items():
        for ratio, percent in ((0.5, "50"), (0.25, "25")):
            expected[f"{name}-keep{percent}"] = (policy, ratio, *rest, 0, 0)
    assert seen == expected
    towers = {case.recipe.model.model_dump_json() for case in cases}
    assert len(towers) == 1 and len({case.recipe.optimizer for case in cases}) == 1


def test_noise_in_the_mask_is_for_the_rows_that_go_by_scores():
    noise = ["mask.warmup=0.2", "mask.temperature=1"]
    for case in make_cases(choose_rows(["masks"]), SMALL_RECIPE, noise, [0.5]):
        mask, by_scores = case.recipe.mask, case.recipe.mask.policy in ("attentive", "inverse")
        assert (mask.warmup, mask.temperature) == ((0.2, 1) if by_scores else (0, 0))
    assert not {"mask.warmup", "mask.temperature"} & decided_by(choose_rows(["masks"]))


def test_a_cheap_teacher_is_for_the_rows_that_can_have_it():
    rows = choose_rows(["masks", "systems"])
    cases = make_cases(rows, "aclip_fast_vitb16", ["teacher.score_layers=3"], [0.5])
    teachers = {case.row.name: case.recipe.teacher for case in cases if case.recipe.teacher}
    of_mask = dict.fromkeys(["attentive_1x", "attentive_2x", "inverse_2x"], (4, 3))
    assert {name: (each.reuse, each.score_layers) for name, each in teachers.items()} == {
        **of_mask, "aclip": (1, 3), "aclip_eff": (1, 3), "maskclip": (1, None)
    }  # fmt: skip
    assert not {"teacher.reuse", "teacher.score_layers"} & decided_by(rows)


def test_rows_keep_the_papers_order_and_a_wrong_name_says_which_there_are():
    names = [row.name for row in choose_rows(["inverse_2x", "masks", "clip"])]
    assert names == ["clip", "random_1x", "random_2x", "attentive_1x", "attentive_2x", "inverse_2x"]
    with pytest.raises(ConfigError, match="--rows names a.b=1; write key=value before --rows"):
        choose_rows(["masks", "a.b=1"])
    with pytest.raises(ConfigError, match="--rows names randon_2x; take some of masks, systems"):
        choose_rows(["randon_2x"])


def test_a_base_without_teacher_and_a_wrong_ratio_are_refused():
    with pytest.raises(ConfigError, match="clip_vitb16, which has no teacher"):
        make_cases(choose_rows(["clip"]), "clip_vitb16", [], [0.5])
    with pytest.raises(ConfigError, match="mask.keep_ratio is 1.5"):
        cases_of("random_1x", keep_ratios=[1.5])


def test_means_and_standard_errors_over_seeds(tmp_path):
    random, attentive = read_results(finished_runs(tmp_path))
    # Two values a and b: their standard error is |a - b| / 2.
    assert [(m.value, m.error) for m in random.accuracy()] == [
        pytest.approx(pair) for pair in [(0.12, 0.02), (0.21, 0.01), (0.30, 0.0), (0.42, 0.02)]
    ]
    assert [(m.value, m.error) for m in attentive.objects()] == [
        pytest.approx((0.5, 0.0)),
        pytest.approx((0.81, 0.01)),
    ]
    # Seed by seed: 0.10 and 0.08, 0.10 and 0.14, 0.10 and 0.10, 0.10 and 0.06.
    assert [(m.value, m.error) for m in difference(attentive, random)] == [
        pytest.approx(pair) for pair in [(0.09, 0.01), (0.12, 0.02), (0.10, 0.0), (0.08, 0.02)]
    ]
    # 4000 samples at 100 and at 50 a second.
    assert (random.seconds(), attentive.seconds()) == (40, 80)
    mean = Mean.of([0.1, 0.2, 0.6])
    assert (mean.value, mean.error) == pytest.approx((0.3, (0.14 / 2 / 3) ** 0.5))


def test_the_page_shows_the_table_the_differences_and_the_order(tmp_path):
    results = read_results(finished_runs(tmp_path))
    write_report(Page("Ablation", "", results), tmp_path)
    text = (tmp_path / "ablation.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert rows[2] == (
        "| random, 2 x 50 % | 12.0 ± 2.0 | 21.0 ± 1.0 | 30.0 ± 0.0 | 42.0 ± 2.0 "
        "| 81.0 ± 1.0 (50.0 ± 0.0) | 4,000 | 1.00 | 1.00 | 38.0 | 2 |"
    )
    assert rows[3].endswith("| 1.50 | 2.00 | 41.3 | 2 |")
    assert rows[6] == (
        "| attentive, 2 x 50 % - random, 2 x 50 % | +9.0 ± 1.0 | +12.0 ± 2.0 | +10.0 ± 0.0 "
        "| +8.0 ± 2.0 |"
    )
    order = "attentive, 2 x 50 % > random, 2 x 50 %"
    assert f"At the end the order is the published one: {order}." in text
    one_seed = [replace(result, outcomes={0: result.outcomes[0]}) for result in results]
    write_report(Page("Ablation", "", one_seed), tmp_path / "one seed")
    text = (tmp_path / "one seed" / "ablation.md").read_text()
    assert "is the published one" not in text
    assert "attentive, 2 x 50 % ~ random, 2 x 50 % (~: less than two standard errors apart" in text
    assert (tmp_path / "accuracy-keep50.png").read_bytes()[1:4] == b"PNG"
    assert page_of_json(tmp_path / "ablation.json") == Page("Ablation", "", results)
    alike = [replace(each, label="same", keep_ratio=None) for each in results]
    write_report(Page("Ablation", "", alike), tmp_path / "alike")
    page = (tmp_path / "alike" / "ablation.md").read_text()
    assert {f"same, {each.row}" for each in results} <= set(re.findall(r"same, \w+", page))


def test_a_run_with_an_evaluation_missing_is_named(tmp_path):
    run = finished_runs(tmp_path)[0]
    write_metrics(run.folder, POINTS["random_2x"][0][:-1])
    with pytest.raises(ConfigError, match="random_2x-keep50-seed0 holds no evaluation after 4000"):
        read_results([run])
    (run.folder / "metrics.jsonl").unlink()
    with pytest.raises(ConfigError, match="random_2x-keep50-seed0 can't be read"):
        read_results([run])


def test_rows_without_a_common_seed_have_no_difference(tmp_path):
    runs = finished_runs(tmp_path)
    chosen = [
        run
        for run in runs
        if run.folder.name in ("random_2x-keep50-seed0", "attentive_2x-keep50-seed1")
    ]
    write_report(Page("Ablation", "", read_results(chosen)), tmp_path)
    assert "difference" not in (tmp_path / "ablation.md").read_text()


def test_masks_are_measured_on_sets_without_known_objects_too(tmp_path):
    run, *_ = finished_runs(tmp_path)
    write_metrics(run.folder, POINTS["random_2x"][0])
    with open(run.folder / "metrics.jsonl", "a") as file:
        file.write('{"samples": 0, "evaluation": "mask", "metrics": {"attention_kept": 0.5}}\n')
    assert read_results([run])[0].objects() == []


def test_one_seed_has_no_error(tmp_path):
    results = read_results(finished_runs(tmp_path, seeds=1))
    write_report(Page("Ablation", "", results), tmp_path)
    assert (
        "| random, 2 x 50 % | 10.0 | 20.0 | 30.0 | 40.0 | 80.0 (50.0) |"
        in (tmp_path / "ablation.md").read_text()
    )


SCRIPT = """
import os, pathlib, sys
folder = pathlib.Path(sys.argv[sys.argv.index("--output") + 1])
(folder / "checkpoints").mkdir()
with open(folder.parent / "started", "a") as file:
    file.write(f"{folder.name} {os.environ['DEVICE']} {sys.argv[-1]}\\n")
if folder.name == os.environ.get("BREAKS"):
    print("it broke")
    sys.exit(int(os.environ.get("STATUS", 7)))
"""


def run_script(tmp_path, runs, devices=2, **settings):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    reports = []
    runner = Runner(
        [sys.executable, str(script)],
        [{"DEVICE": str(index)} for index in range(devices)],
        lambda: reports.append(1),
        **settings,
    )
    failed, was_stopped = runner.run(runs)
    started = (tmp_path / "started").read_text().splitlines()
    (tmp_path / "started").unlink()
    return [run.folder.name for run in failed], was_stopped, sorted(started), len(reports)


def test_runs_go_to_the_devices_and_a_failed_one_alone_is_tried_again(
    tmp_path, monkeypatch, capsys
):
    runs = make_runs(cases_of("clip", "random_1x"), 2, tmp_path, {}, DATA)
    monkeypatch.setenv("BREAKS", "clip-seed1")
    failed, _, started, num_reports = run_script(tmp_path, runs)
    assert failed == ["clip-seed1"] and num_reports == 3
    # Small files are left of a finished run, and all of one that is to go on.
    assert [run.folder.name for run in runs if (run.folder / "checkpoints").is_dir()] == failed
    (tmp_path / "clip-seed1" / "checkpoints").rmdir()
    assert [line.split()[::2] for line in started] == [
        ["clip-seed0", "train.seed=0"],
        ["clip-seed1", "train.seed=1"],
        ["random_1x-keep50-seed0", "train.seed=0"],
        ["random_1x-keep50-seed1", "train.seed=1"],
    ]
    assert {line.split()[1] for line in started} == {"0", "1"}
    assert "clip-seed1 ended with status 7: it broke" in capsys.readouterr().out
    monkeypatch.delenv("BREAKS")
    failed, _, started, _ = run_script(tmp_path, runs)
    assert failed == [] and [line.split()[0] for line in started] == ["clip-seed1"]
    assert "4 runs, 3 of them finished before" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_is_a_result_of_a_sweep_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("STATUS", "3")
    (case,) = cases_of("clip")
    for may_diverge in (True, False):
        folder = tmp_path / f"{may_diverge}"
        monkeypatch.setenv("BREAKS", folder.name)
        run = make_run(case, 0, folder, {}, DATA, may_diverge)
        failed, *_ = run_script(tmp_path, [run], keeps_checkpoints=True)
        assert failed == ([] if may_diverge else [folder.name])
        assert run.is_finished == run.has_diverged == may_diverge
        assert (folder / "checkpoints").is_dir()


STOPPED = """
import os, signal, sys, time
from pathlib import Path
from aclip.ablation.cases import make_cases
from aclip.ablation.rows import choose_rows
from aclip.ablation.runner import Runner
from aclip.ablation.runs import make_runs
out = Path(sys.argv[1])
child = out / "child.py"
child.write_text('''
import os, signal, sys, time
from pathlib import Path
folder = Path(sys.argv[sys.argv.index("--output") + 1])
def end(*_):
    folder.joinpath("was_told").touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, end)
folder.joinpath("pid").write_text(str(os.getpid()))
folder.joinpath("ready").touch()
time.sleep(120)
''')
runs = make_runs(make_cases(choose_rows(["masks"]), "demo", [], [0.5]), 1, out, {}, {})
failed, was_stopped = Runner([sys.executable, str(child)], [{}, {}], lambda: None).run(runs)
sys.exit(143 if was_stopped and not failed else 1)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_ends_the_runs_and_starts_no_more(tmp_path, number):
    process = subprocess.Popen([sys.executable, "-c", STOPPED, str(tmp_path)])
    folders = [tmp_path / "clip-seed0", tmp_path / "random_1x-keep50-seed0"]
    wait_for(lambda: all((folder / "ready").is_file() for folder in folders))
    pids = [int((folder / "pid").read_text()) for folder in folders]
    process.send_signal(number)
    assert process.wait(timeout=30) == (143 if number != signal.SIGKILL else -signal.SIGKILL)
    wait_for(lambda: all((folder / "was_told").is_file() for folder in folders))
    assert not still_running(pids, 60)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == [
        folder.name for folder in folders
    ]


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
