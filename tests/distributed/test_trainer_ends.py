"""How a run ends: full disk, what is not finite, failed evaluation, upload, longer schedule."""

import contextlib
import json
import os
import re
import subprocess
import time
from pathlib import Path

import pytest
import torch
from small_recipe import SMALL_RECIPE
from trainer_run import BATCH, RECIPE, STEPS, run_trainer, train_in, write_shards

from aclip.config.arguments import parse
from aclip.evaluation.during_training import Evaluation
from aclip.run_folder import checkpoint_folder
from aclip.run_folder.metrics_file import read_metrics
from aclip.training import checkpoint, stepper
from aclip.training.pretrain import pretrain
from aclip.training.step_watch import NonFiniteLoss
from aclip.training.upload import Uploader

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 MB, of which a checkpoint takes 13."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no small file system can be mounted: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_disk_costs_checkpoints_but_not_the_run(
    run_distributed, shards, tmp_path, small_disk, capfd
):
    notes, filler, run = tmp_path / "notes", small_disk / "filler", small_disk / "run"
    notes.mkdir()
    seen = {}

    def on_step(step):
        if int(os.environ["RANK"]) > 0:
            return
        if step == 7:
            while checkpoint_folder.find(run / "checkpoints", "auto") is None:
                time.sleep(0.01)  # that of step 5 is still written
            with open(filler, "wb", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(bytes(1 << 16))
        if step == 16:  # that of step 15 was begun after the checkpoint of step 10 had failed
            found = checkpoint_folder.find(run / "checkpoints", "auto")
            seen["full"] = (found.name, checkpoint_folder.verify(found))
            filler.unlink()

    def train():
        overrides = [f"train.checkpoint_every={5 * BATCH}"]
        run_trainer(run, shards, overrides=overrides, on_step=on_step, notes=notes)
        return seen

    seen = run_distributed(train, 2, timeout=300)[0]
    assert seen["full"] == (f"samples-{5 * BATCH:012d}", None)
    said = capfd.readouterr().out
    assert f"samples-{10 * BATCH:012d} was not written" in said
    assert "No space left" in said and "the run goes on" in said
    last = checkpoint_folder.find(run / "checkpoints", "auto")
    assert last.name == f"samples-{STEPS * BATCH:012d}"
    assert checkpoint_folder.verify(last) is None
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert {17, STEPS} <= {json.loads(line)["step"] for line in lines}, "whole lines only"


def test_loss_that_is_not_finite_stops_every_rank_and_keeps_the_checkpoint(
    run_distributed, shards, tmp_path
):
    run = tmp_path / "run"
    run_distributed(train_in(run, shards, stop_at=4), 2)

    def diverge():
        with pytest.raises(NonFiniteLoss) as caught:
            run_trainer(
                run, shards, overrides=["optimizer.lr=1e30", "optimizer.warmup_start_lr=1e30"]
            )
        return str(caught.value)

    for message in run_distributed(diverge, 2):
        assert "contrastive" in message and "step" in message
        assert message.count("/0") >= BATCH // 2, "the samples' keys are listed"
    folder = checkpoint_folder.find(run / "checkpoints", "auto")
    assert checkpoint.read_state(folder)["step"] == 4


class Overflow(torch.autograd.Function):
    """The identity with an infinite gradient."""

    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("inf")


@pytest.mark.parametrize("stage", ["0", "1", "3"])
def test_gradient_that_is_not_finite_stops_every_rank_too(run_distributed, shards, tmp_path, stage):
    run = tmp_path / "run"

    def overflow_in_step_3():
        total, losses = stepper.total, []

        def with_overflow(*args):
            loss, terms = total(*args)
            losses.append(loss)
            return (Overflow.apply(loss) if len(losses) == 3 else loss), terms

        stepper.total = with_overflow
        with pytest.raises(NonFiniteLoss) as caught:
            run_trainer(run, shards, stage=stage, overrides=[f"train.checkpoint_every={2 * BATCH}"])
        return str(caught.value)

    for message in run_distributed(overflow_in_step_3, 2):
        assert "gradient of step 3" in message
        assert re.search("gradient_norm (inf|nan)", message)
    folder = checkpoint_folder.find(run / "checkpoints", "auto")
    assert checkpoint.read_state(folder)["step"] == 2


def test_evaluation_that_fails_at_the_end_costs_nothing_that_was_trained(
    run_distributed, shards, tmp_path
):
    calls = []

    def fail(models, teacher, progress):
        calls.append(list(models))
        if len(calls) > 1:
            raise RuntimeError("no memory")
        return Evaluation({"student": {"num_calls": 1}})

    run, overrides = tmp_path / "run", ["train.epochs=2"]
    with pytest.raises(RuntimeError, match="no memory"):
        run_distributed(train_in(run, shards, overrides=overrides, evaluator=fail), 2)
    folder = checkpoint_folder.find(run / "checkpoints", "auto")
    assert checkpoint.read_state(folder)["step"] == 10


def test_ranks_end_after_rank_0_has_uploaded(run_distributed, shards, tmp_path):
    words = ["--ds_config", str(tmp_path / "ds.json"), "--output", str(tmp_path / "run")]
    words += [
        "--recipe",
        SMALL_RECIPE,
        "--train",
        str(Path(shards[0].url).parent / "*.tar"),
        *RECIPE,
        "train.epochs=2",
    ]
    words += ["data.val=[]", f"train.upload_to=file://{tmp_path}/remote"]
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    last = tmp_path / "remote" / checkpoint_folder.LATEST

    def run():
        upload = Uploader._upload

        def slow(*args):
            time.sleep(2)
            upload(*args)

        Uploader._upload = slow
        return pretrain(parse(words)), last.is_file()

    assert run_distributed(run, 2) == [(0, True), (0, True)]


def test_run_that_is_made_longer_is_evaluated_at_its_new_end(run_distributed, shards, tmp_path):
    notes, run = tmp_path / "notes", tmp_path / "run"

    def evaluate(models, teacher, progress):
        with open(notes, "a") as file:
            file.write(f"{progress:g} ")
        of_student = {"num_calls": len(notes.read_text().split())}
        return Evaluation({"student": of_student, "mask": {}}, warning="it is blind")

    # Before the first step, at the first end, and at the new one.
    for epochs, num_calls, end in ((2, 2, 10), (2, 2, 10), (3, 3, 15)):
        overrides = [f"train.epochs={epochs}"]
        run_distributed(train_in(run, shards, overrides=overrides, evaluator=evaluate), 1)
        state = checkpoint.read_state(checkpoint_folder.find(run / "checkpoints", "auto"))
        assert state["evaluations"]["end"]["student"] == {"num_calls": num_calls}
        assert state["step"] == end
        of_student, of_mask = read_metrics(run).evaluations[-2:]
        assert of_mask.samples == end * BATCH
        assert (of_student.warning, of_mask.warning) == ("", "it is blind")
    assert notes.read_text() == "0 1 1 "


def test_resumed_run_keeps_its_wandb_id_and_a_report_that_fails_ends_no_run(
    run_distributed, shards, tmp_path, monkeypatch, capfd
):
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = tmp_path / "run"
    overrides = ["train.wandb=project"]
    for steps in (2, 3):  # without recipe.yaml, which only launch/pretrain.py writes
        train = train_in(run, shards, overrides=overrides, stop_at=steps)
        run_distributed(train, 1)
        out = capfd.readouterr().out
        assert out.count("the report was not written: ConfigError: RUN is") == 1
    wandb_id = checkpoint.read_state(checkpoint_folder.find(run / "checkpoints", "auto"))[
        "wandb_id"
    ]
    folders = [path.name for path in (run / "wandb").glob("offline-run-*")]
    assert len(folders) == 2 and all(name.endswith(f"-{wandb_id}") for name in folders)


def test_run_that_begins_from_another_ones_checkpoint_is_a_run_of_its_own(
    run_distributed, shards, tmp_path, monkeypatch, capfd
):
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    words = [
        "--ds_config",
        str(tmp_path / "ds.json"),
        *RECIPE,
        "data.val=[]",
        "train.wandb=project",
    ]
    words += ["--recipe", SMALL_RECIPE, "--train", str(Path(shards[0].url).parent / "*.tar")]
    first, second = tmp_path / "first", tmp_path / "second"

    def run(*more):
        run_distributed(lambda: pretrain(parse([*words, *more])), 1)
        latest = checkpoint_folder.find(Path(more[1]) / "checkpoints", "auto")
        return checkpoint.read_state(latest)["wandb_id"]

    first_id = run("--output", str(first), "train.epochs=1")
    # Told by a crash before its first checkpoint, and not to be mixed with what follows.
    second.mkdir()
    (second / "metrics.jsonl").write_text('{"samples": 8, "step": 1, "terms": {"loss": 1.0}}\n')
    (second / "recipe.yaml").write_text("of the crashed run")
    words += ["train.epochs=2", "--resume", str(first)]
    second_id = run("--output", str(second))
    assert second_id != first_id
    assert f"its earlier start told is in {second / 'earlier-1'}" in capfd.readouterr().out
    assert [line.step for line in read_metrics(second).steps] == [6, 7, 8, 9, 10]
    assert [line.step for line in read_metrics(second / "earlier-1").steps] == [1]
    assert (second / "earlier-1" / "recipe.yaml").read_text() == "of the crashed run"
    assert json.loads((second / "start.json").read_text()) == {
        "resume": str(first),
        "checkpoint": str(first / "checkpoints" / f"samples-{5 * BATCH:012d}"),
    }
    run("--output", str(tmp_path / "third"), "train.epochs=1")  # is complete, and has a checkpoint
    again = ["train.epochs=3", "--allow_changes"]
    assert run("--output", str(second), *again) == second_id
    assert "continuing from " + str(second) in capfd.readouterr().out
