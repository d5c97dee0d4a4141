"""Finished runs of an ablation, written by hand."""

import json
from dataclasses import replace

from small_recipe import SMALL_RECIPE

from aclip.ablation.cases import make_cases
from aclip.ablation.rows import choose_rows
from aclip.ablation.runs import make_runs

DATA = {"shards": 48, "samples": 7680}
POINTS = {
    # row: (points of seed 0, points of seed 1), shares at 0, 25, 50, 75 and 100 %
    "random_2x": ([0.04, 0.10, 0.20, 0.30, 0.40], [0.05, 0.14, 0.22, 0.30, 0.44]),
    "attentive_2x": ([0.04, 0.20, 0.30, 0.40, 0.50], [0.05, 0.22, 0.36, 0.40, 0.50]),
}


FLOPS = {"random_2x": (0.0, 0.5, 1.0, 1.5, 2.0), "attentive_2x": (0.0, 0.5, 1.0, 2.0, 3.0)}


def cases_of(*names, keep_ratios=(0.5,), overrides=()):
    return make_cases(choose_rows(list(names)), SMALL_RECIPE, list(overrides), list(keep_ratios))


def evaluated(case, flops=(0.0, 0.5, 1.0, 1.5, 2.0)):
    """The case with evaluations after 1000, 2000, 3000 and 4000 samples."""
    length = ["train.samples=4000", "train.evaluate_at=[1000, 2000, 3000, 4000]"]
    return replace(case.changed(length), flops=flops)


def write_metrics(folder, points, objects=(), rate=100.0):
    lines = [
        {"samples": 1000 * quarter, "evaluation": name, "metrics": {metric: value}}
        for name, metric, values in (
            ("student", "zero_shot_top1", points),
            ("teacher", "zero_shot_top1", [1 - value for value in points]),
            ("mask", "object_patches_kept", objects),
        )
        for quarter, value in enumerate(values)
    ]
    for step in range(1, 4):  # the first is slow, as it is in a run
        seconds = rate / 10 if step == 1 else rate
        lines.append(
            {"samples": 100 * step, "step": step, "terms": {}, "images_per_second": seconds}
        )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def finished_runs(tmp_path, seeds=2):
    cases = [evaluated(case, FLOPS[case.row.name]) for case in cases_of(*POINTS)]
    runs = make_runs(cases, seeds, tmp_path, {}, DATA)
    for run in runs:
        name = run.case.row.name
        objects = [0.5, 0.6, 0.7, 0.7, 0.8 + 0.02 * run.seed]
        rate = 50.0 if name == "attentive_2x" else 100.0
        write_metrics(run.folder, POINTS[name][run.seed], objects, rate)
        run.note(finished=True)
    return runs
