"""The cost table: ratios of a hand-made run, synthetic batches, open_clip's step, one real run."""

import argparse
import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean, median

import pytest
import torch
from small_recipe import SMALL_RECIPE

from aclip.benchmarks.cost_table import System, format_table, make_row, with_average
from aclip.benchmarks.device_work import DeviceWork
from aclip.benchmarks.step_cost import benchmark_steps
from aclip.benchmarks.turns import take_turns
from aclip.config.recipe_file import load_recipe
from aclip.data.synthetic import (
    batch_of_mean_captions,
    caption_lengths,
    synthetic_batch,
    synthetic_tokens,
)
from aclip.errors import ConfigError
from aclip.planning.open_clip_step import OpenClipStep

ROOT = Path(__file__).parents[2]
SMALL = [
    "model.image.resolution=32",
    "model.image.kwargs={patch_size: 8, embed_dim: 64, depth: 2, num_heads: 2}",
    "model.text={width: 32, heads: 2, layers: 2, context_length: 77}",
    "model.embed_dim=16",
]


def system(name, seconds, peak_bytes=0):
    return System(name, lambda: None, 2 * 2**20, 1.5, seconds=list(seconds), peak_bytes=peak_bytes)


def test_ratio_is_the_median_of_the_rounds_ratios():
    # The machine slows down from round to round; the ratios of a round do not.
    base, other = system("base", [1, 2, 8]), system("other", [2, 4.2, 12], 3 * 2**20)
    row = make_row(other, [base, other], ["base"], batch_size=4)
    assert row.ratios == {"base": pytest.approx(2.0)}
    assert row.spread == pytest.approx((1.5, 2.1))
    assert row.step_seconds == 4.2
    assert row.images_per_second == pytest.approx(4 / 4.2)
    assert (row.state_mib, row.step_mib) == (2, 3)
    assert "2.000" in format_table([row], ["base"], {"device": "none"})


def test_average_over_the_kinds_of_step_is_made_round_by_round():
    base, teaching, other = system("base", [1, 2]), system("a", [4, 6], 9), system("b", [2, 4], 5)
    teaching.gflops, teaching.share, other.share = 3.5, 0.25, 0.75
    average, *kinds = with_average("own", [teaching, other])
    assert kinds == [teaching, other]
    assert average.seconds == [2.5, 4.5]
    assert (average.name, average.gflops, average.peak_bytes) == ("own", 2.0, 9)
    row = make_row(average, [average, base], ["base"], batch_size=4)
    assert row.ratios == {"base": (2.5 + 2.25) / 2}
    assert "own: the average over a run" in format_table([row], ["base"], {})
    assert with_average("base", [base]) == [base]


def test_average_of_what_a_gpu_does():
    kinds = [
        replace(system("a", [4]), share=0.25),
        replace(system("b", [2]), share=0.75),
    ]
    assert with_average("own", kinds)[0].work is None
    for each, work in zip(kinds, (DeviceWork(100, 2.0), DeviceWork(60, 1.0)), strict=True):
        each.work = work
    assert with_average("own", kinds)[0].work == DeviceWork(70, 1.25)


@pytest.mark.parametrize("rebuild", [False, True])
def test_systems_take_turns_and_all_are_in_memory_or_one_at_a_time(rebuild):
    seen, alive = [], []

    @contextmanager
    def build(name, *kinds):
        alive.append(name)

        def step_of(kind):
            def step():
                assert name in alive
                seen.append((kind, len(alive)))
                time.sleep(0.01)

            return step

        yield [System(kind, step_of(kind), 0, None) for kind in kinds]
        alive.remove(name)

    builds = [partial(build, "a", "a1", "a2"), partial(build, "b", "b1")]
    found = take_turns(builds, 3, torch.device("cpu"), rebuild)
    assert not alive
    assert [[system.name for system in systems] for systems in found] == [["a1", "a2"], ["b1"]]
    # CPU time, of which sleeping takes none.
    assert all(
        len(system.seconds) == 3 and 0 <= max(system.seconds) < 0.01
        for systems in found
        for system in systems
    )
    order = [kind for kind, _ in seen]
    if not rebuild:
        assert {number for _, number in seen} == {2}
        assert order[-9:] == ["a1", "a2", "b1"] * 3
        return
    assert {number for _, number in seen} == {1}
    # Nobody's timed step follows directly on building it.
    assert order[-12:] == ["a1", "a2", "a1", "a2", "b1", "b1"] * 2
    with pytest.raises(RuntimeError, match="no longer in memory"):
        found[0][0].step()


def test_captions_have_the_published_lengths():
    lengths = caption_lengths(1000, 77)
    assert median(lengths) == 12
    assert 18 < mean(lengths) < 20.5  # a little under 20: the longest are cut
    assert min(lengths) == 3 and max(lengths) == 77


def test_synthetic_captions_end_where_their_lengths_say():
    lengths = caption_lengths(16, 77)
    tokens = synthetic_tokens(lengths, 77)
    ids = tokens.ids
    assert ids.shape == (16, 77)
    assert (ids.argmax(1) + 1).tolist() == tokens.lengths.tolist() == lengths
    assert (ids[:, 0] == 49406).all()
    assert torch.equal((ids == 0).sum(1), 77 - tokens.lengths)


@pytest.mark.parametrize("mean_length", [2, 12.5, 22])
def test_captions_of_a_given_mean_length(mean_length):
    tokens = batch_of_mean_captions(load_recipe(SMALL_RECIPE), mean_length, 32).tokens
    lengths = tokens.lengths.tolist()
    assert tokens.ids.shape[1] == 32
    assert mean(lengths) == mean_length
    assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize(
    "name", ["slip_vitb16", "maskclip_vitb16", "random_2x50_vitb16", SMALL_RECIPE]
)
def test_synthetic_batch_holds_what_the_recipe_reads(name):
    recipe = load_recipe(name)
    batch = synthetic_batch(recipe, 3)
    assert (batch.teacher_view is not None) == recipe.needs_teacher_view
    assert (batch.ssl_views is not None) == (name == "slip_vitb16")
    assert list(batch.term_noise) == (["distill", "mlm"] if name == "maskclip_vitb16" else [])
    assert (batch.mask_noise is not None) == (name == "random_2x50_vitb16")
    assert len(batch.split(2)) == 2


def test_patch_dropout_of_the_open_clip_step_changes_its_loss_and_none_does_not():
    recipe = load_recipe(SMALL_RECIPE, SMALL)
    step = OpenClipStep(recipe, 4, torch.device("cpu"))
    first = step.step(0.0)
    assert torch.isfinite(first) and step.step(0.5) != step.step(0.0)
    assert step.state_bytes() > 0


def test_command_prints_every_system_and_writes_the_figures(tmp_path):
    figures = tmp_path / "figures.json"
    command = [sys.executable, "launch/benchmark.py", "demo", "--against", "open_clip"]
    command += ["--batch_size", "2", "--rounds", "2", "--json", str(figures), "--set", *SMALL]
    command += ["teacher.resolution=32", "mask.warmup=0.25"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(figures.read_text())["rows"]
    kinds = ["demo", "demo, teaching step (75%)", "demo, other step (25%)"]
    names = [*kinds, "open_clip", "open_clip, patch dropout 0.5"]
    assert [row["name"] for row in rows] == names
    assert [row["is_average"] for row in rows] == [True, False, False, False, False]
    assert rows[0]["ratios"]["demo"] == rows[3]["ratios"]["open_clip"] == 1
    assert rows[2]["gflops"] < rows[0]["gflops"] < rows[1]["gflops"]
    for row in rows:
        assert row["name"] in done.stdout and row["step_seconds"] > 0


def test_baseline_that_is_not_measured_is_refused():
    arguments = argparse.Namespace(
        recipes=["demo"],
        baseline="clip_vitb16",
        set=[],
        batch_size=2,
        threads=1,
        rounds=1,
        json=None,
    )
    with pytest.raises(ConfigError, match="--baseline is clip_vitb16, .* not among demo"):
        benchmark_steps(arguments)
