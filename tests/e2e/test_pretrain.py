"""`deepspeed launch/pretrain.py` on the demo: every shipped ds_config, kill and resume, signals."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
from shard_files import write_shard

pytestmark = pytest.mark.e2e

# Eight steps of 48 images; each step is logged.
SHORT = ["train.global_batch_size=48", "train.samples=384", "train.log_every=1"]
SHORT += ["train.warmup_epochs=0.125"]  # 400 samples
SMALL = ["model.image.kwargs={patch_size: 8, embed_dim: 48, depth: 2, num_heads: 3}"]
STEPS = 8


@pytest.fixture
def quick_evaluation(tmp_path) -> list[str]:
    """Arguments that leave little to evaluate, for tests of something else."""
    write_shard(tmp_path / "val.tar", 4)
    return ["--val", str(tmp_path / "val.tar"), "train.evaluate_every=0"]


def _losses(run_folder: Path) -> dict[int, float]:
    lines = (run_folder / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return {r["step"]: r["terms"]["loss"] for r in records if "terms" in r}


def _kill_after(launcher, kill_all, arguments, folder, seconds) -> bool:
    """Starts a run and kills it `seconds` after its first checkpoint; False if it was faster."""
    process = launcher.start(*arguments)
    while not (folder / "checkpoints" / "latest").exists() and process.poll() is None:
        time.sleep(0.02)
    time.sleep(seconds)
    running = process.poll() is None
    kill_all(process)
    process.stdout.close()
    return running


def _assert_trained_the_demo(result, folder: Path) -> None:
    assert result.status == 0, result.output
    losses = _losses(folder)
    assert sorted(losses) == list(range(1, STEPS + 1))
    assert losses[STEPS] < losses[1]
    figure, report = folder / f"pictures/kept-patches-{STEPS * 48:012d}.png", "report.html"
    for words in ("This is the demo", "chance", "teacher", "the run is complete"):
        assert words in result.output
    assert f"report: {folder / report}\nfigure of kept patches: {figure}" in result.output
    assert "Traceback" not in result.output
    assert figure.is_file()
    page = (folder / report).read_text()
    assert f"<td>Loss</td><td>{losses[STEPS]:.4f}</td>" in page
    assert page.count("image/webp") == 2  # kept patches before and at the end
    assert list((folder / "tensorboard").iterdir())


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3", "zero3_offload"])
def test_shipped_ds_config_trains_the_demo(launcher, quick_evaluation, tmp_path, name):
    arguments = ["--ds_config", f"ds_configs/{name}.json", "--output", str(tmp_path)]
    if name != "zero2":  # which evaluates as a user would
        arguments += quick_evaluation
    if name == "zero3_offload":  # which updates no Muon
        arguments += ["optimizer.name=adamw", "optimizer.lr=0.001"]
    # The launcher treats them all alike and takes seconds of CPU: one goes through it.
    result = launcher.run(*arguments, *SHORT, *SMALL, launcher=name == "zero2")
    assert "the learning rate only rises" in result.output  # 384 samples
    _assert_trained_the_demo(result, tmp_path)


def test_complete_run_prints_its_table_again_and_refuses_other_settings(launcher, tmp_path):
    """On zero0.json, the shipped ds_config that the test above leaves out."""
    arguments = ["--ds_config", "ds_configs/zero0.json", "--output", str(tmp_path), *SHORT, *SMALL]
    first = launcher.run(*arguments)
    _assert_trained_the_demo(first, tmp_path)
    again = launcher.run(*arguments, ranks=1, launcher=False)
    shown = launcher.run(str(tmp_path), script="visualize.py", ranks=1, launcher=False)
    assert shown.status == 0 and f"wrote {tmp_path / 'figure/figure.html'}" in shown.output
    assert "| attentive |" in shown.output
    nothing = launcher.run(str(tmp_path / "no"), script="report.py", ranks=1, launcher=False)
    assert nothing.status == 2 and nothing.output.startswith("error: RUN is ")

    def table(output: str) -> list[str]:
        lines = output.splitlines()
        start = next(i for i, line in enumerate(lines) if line.split()[:1] == ["chance"])
        return lines[start : start + 5]

    assert again.status == 0
    assert "building the towers" not in again.output, "nothing is trained, so nothing is built"
    assert table(first.output) == table(again.output)

    other = launcher.run(*arguments, "model.embed_dim=64", launcher=False)
    assert other.status != 0 and other.seconds < 30
    assert "Traceback" not in other.output
    assert other.output.count(f"error: --output is {tmp_path}, which holds a complete run") == 2
    assert "model.embed_dim 96 -> 64" in other.output


def test_run_killed_at_random_moments_equals_an_uninterrupted_one(
    launcher, kill_all, quick_evaluation, tmp_path
):
    rng = random.Random(0)
    options = ["--ds_config", "ds_configs/zero0.json", *quick_evaluation, *SHORT, *SMALL]
    # A checkpoint at every step: most kills fall into one that is being written.
    options.append("train.checkpoint_every=48")
    whole = launcher.run(*options, "--output", str(tmp_path / "whole"), launcher=False)
    assert whole.status == 0, whole.output
    killed = tmp_path / "killed"
    arguments = [*options, "--output", str(killed)]
    kills = _kill_after(launcher, kill_all, arguments, killed, rng.uniform(0, 0.3))
    # The next start finds a checkpoint at once, so its kill waits for the ranks to come up.
    before = (killed / "checkpoints" / "latest").read_text()
    process = launcher.start(*arguments)
    while process.poll() is None and (killed / "checkpoints" / "latest").read_text() == before:
        time.sleep(0.01)
    time.sleep(rng.uniform(0, 0.2))
    kills += process.poll() is None
    kill_all(process)
    process.stdout.close()
    assert kills > 0
    result = launcher.run(*arguments, launcher=False)
    assert result.status == 0, result.output
    expected, actual = _losses(tmp_path / "whole"), _losses(killed)
    assert sorted(actual) == list(range(1, STEPS + 1))
    for step, loss in expected.items():
        assert actual[step] == pytest.approx(loss, rel=1e-6)


def test_sigterm_saves_and_the_same_command_continues(launcher, quick_evaluation, tmp_path):
    """With --resume none too; meanwhile the folder is nobody else's."""
    options = ["--ds_config", "ds_configs/zero0.json", *quick_evaluation, *SHORT, *SMALL]
    options += ["--resume", "none"]
    arguments = [*options, "--output", str(tmp_path), "train.samples=15360"]
    process = launcher.start(*arguments, ranks=1)
    while not (tmp_path / "metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.05)
    second = launcher.run(*arguments, launcher=False)
    assert second.status == 2, second.output
    assert second.output.count(f"error: --output is {tmp_path}, which a run (process ") == 2
    time.sleep(1)
    for _ in range(2):  # a second one while the first is acted upon changes nothing
        _rank_process(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert "stopped by SIGTERM" in output
    state = _state(tmp_path)
    assert 0 < state["step"] < 15360 // 48
    samples = f"train.samples={state['samples'] + 96}"
    # An evaluation that was due where the run was stopped is made up for.
    due = f"train.evaluate_every={state['samples']}"
    shorter = [*options, "--output", str(tmp_path), samples, due]
    refused = launcher.run(*shorter, ranks=1, launcher=False)
    assert refused.status == 2 and "train.samples 15360 -> " in refused.output
    result = launcher.run(*shorter, "--allow_changes", ranks=1, launcher=False)
    assert result.status == 0, result.output
    assert f"evaluation of student at {state['samples']:,} samples" in result.output
    assert f"at {state['samples']:,} samples" in result.output
    assert sorted(_losses(tmp_path)) == list(range(1, state["step"] + 3))


def _state(run_folder: Path) -> dict:
    latest = (run_folder / "checkpoints" / "latest").read_text()
    return json.loads((run_folder / "checkpoints" / latest / "state.json").read_text())


def _rank_process(launcher_pid: int, number: int) -> None:
    """Sends a signal to the ranks alone, as a scheduler that signals every process would."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            command = (entry / "cmdline").read_bytes().split(b"\0")
            group = os.getpgid(int(entry.name))
        except (OSError, ProcessLookupError):
            continue
        is_rank = b"launch/pretrain.py" in command and b"--local_rank=0" in command
        if is_rank and group == launcher_pid:
            os.kill(int(entry.name), number)
