"""The trainer on 1 and 2 ranks: equal losses for every stage and accumulation, exact resume."""

import contextlib
import io
import json
import os
import signal
import subprocess
import tarfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from aclip import checkpoint, checkpoint_folder, stepper
from aclip import run as run_module
from aclip.data.shards import index_shards
from aclip.ds_config import read_ds_config
from aclip.engine import init_distributed
from aclip.errors import ConfigError
from aclip.recipe_file import load_recipe
from aclip.run_arguments import parse
from aclip.trainer import Trainer
from aclip.upload import Uploader
from aclip.watch import NonFiniteLoss

pytestmark = pytest.mark.distributed

NUM_SHARDS, SHARD_SIZE, BATCH = 4, 20, 16
STEPS = 20  # five epochs of eighty samples
RECIPE = [
    f"train.global_batch_size={BATCH}",
    f"train.epochs={STEPS * BATCH / (NUM_SHARDS * SHARD_SIZE)}",
    "train.warmup_epochs=1",
    "optimizer.lr=1e-3",
    "train.log_every=1",
    "train.checkpoint_every=1000000",
    "train.evaluate_every=0",
    "model.image.resolution=32",
    "model.image.kwargs={patch_size: 8, embed_dim: 24, depth: 2, num_heads: 2}",
    "model.text={width: 16, heads: 2, layers: 1, context_length: 16}",
    "model.embed_dim=12",
    "loss.simclr=1",
    "loss.byol=2",
    "loss.simclr_widths=[24, 24, 8]",
    "loss.byol_widths=[24, 8]",
    "teacher.resolution=32",
    "mask.block_size=1",
    "data.workers=0",
]
STAGES = ("0", "1", "2", "3", "3_offload")
EXACT = 1e-6


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)
    for shard in range(NUM_SHARDS):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for index in range(SHARD_SIZE):
                pixels = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
                buffer = io.BytesIO()
                Image.fromarray(pixels).resize((48, 40)).save(buffer, "JPEG")
                caption = f"a photo of {'thing ' * int(rng.integers(1, 6))}{shard} {index}"
                for suffix, content in (("jpg", buffer.getvalue()), ("txt", caption.encode())):
                    info = tarfile.TarInfo(f"{index:03d}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return index_shards([str(folder / f"{shard}.tar") for shard in range(NUM_SHARDS)])


class Recorder(Trainer):
    """Writes each step's loss and this rank's sample keys, boxes and colours to a file."""

    record: Path
    kill_at: int | None = None
    on_step: Callable[[int], None] | None = None

    def train_step(self, batch):
        terms = super().train_step(batch)
        line = {
            "step": self.step,
            "keys": batch.keys,
            "boxes": batch.student_boxes.tolist(),
            "colours": batch.augment_params.tolist(),
        }
        with open(self.record, "a") as file:
            file.write(json.dumps(line) + "\n")
        if self.kill_at == self.step:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.on_step is not None:
            self.on_step(self.step)
        return terms


def _train(
    run,
    shards,
    stage="0",
    micro_batch=None,
    overrides=(),
    kill_at=None,
    stop_at=None,
    on_step=None,
    notes=None,
    evaluator=None,
):
    """Runs a trainer on this rank to its end; called inside run_distributed.

    Args:
        notes: folder of the test's own files, where they don't belong into `run`.
    """
    notes = notes or run
    device = init_distributed()
    ranks = int(os.environ["WORLD_SIZE"])
    values = {"gradient_clipping": 0.0, "zero_optimization": {"stage": int(stage[0])}}
    if stage.endswith("_offload"):
        values["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    if stage[0] == "3":
        values["zero_optimization"]["stage3_param_persistence_threshold"] = 100
    if micro_batch is not None:
        values["train_micro_batch_size_per_gpu"] = micro_batch
    run.mkdir(exist_ok=True)
    path = notes / f"ds-{os.environ['RANK']}.json"
    path.write_text(json.dumps(values))
    recipe = load_recipe("demo", [*RECIPE, *overrides])
    ds_config = read_ds_config(str(path), BATCH, ranks)
    resume_from = checkpoint_folder.find(run / "checkpoints", "auto")
    trainer = Recorder(recipe, ds_config, shards, run, resume_from, device, evaluator)
    trainer.record = notes / f"record-{os.environ['RANK']}-of-{ranks}.jsonl"
    trainer.kill_at, trainer.on_step = kill_at, on_step
    if stop_at is not None:
        trainer.num_steps = stop_at
    trainer.train()
    trainer.close()


def _losses(run: Path) -> list[float]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    return [record["terms"]["loss"] for record in records]


def _global_batches(run: Path, ranks: int) -> dict[int, dict]:
    """What every step saw, ranks joined; trained twice after a kill, it must have seen the same."""
    per_rank: list[dict[int, dict]] = []
    for rank in range(ranks):
        seen: dict[int, dict] = {}
        for text in (run / f"record-{rank}-of-{ranks}.jsonl").read_text().splitlines():
            line = json.loads(text)
            assert seen.setdefault(line["step"], line) == line
        per_rank.append(seen)
    steps = set.intersection(*(set(seen) for seen in per_rank))
    names = ("keys", "boxes", "colours")
    return {
        step: {name: sum((seen[step][name] for seen in per_rank), []) for name in names}
        for step in steps
    }


def test_losses_are_equal_for_every_stage_rank_count_and_accumulation(
    run_distributed, shards, tmp_path
):
    def run(name, ranks, **options):
        run_distributed(_train_in(tmp_path / name, shards, **options), ranks, timeout=300)
        losses = _losses(tmp_path / name)
        assert len(losses) == STEPS
        return losses

    expected = run("reference", 1)
    assert expected[-1] < expected[0]
    different = [run("accumulated", 1, micro_batch=4), run("two", 2)]
    different += [run(f"two-{stage}", 2, stage=stage, micro_batch=4) for stage in STAGES]
    for losses in different:
        assert losses == pytest.approx(expected, rel=1e-4)


MASKCLIP = ["mask.policy=none", "loss.simclr=0", "loss.byol=0", "loss.distill=1", "loss.mlm=0.2"]
MASKCLIP += ["distill.num_codewords=32", "mlm.decoder_layers=1"]
EASY_SSL_VIEWS = ["views.ssl=2", "views.ssl_scale=[0.9, 1]", "views.ssl_flip_prob=0"]
EASY_SSL_VIEWS += ["ssl_augment={jitter_prob: 0, grayscale_prob: 0, blur_prob: 0}"]
FAMILIES = {
    "clip": ["mask.policy=none", "views.student=1", "loss.simclr=0", "loss.byol=0", "teacher=null"],
    "slip": [
        *("mask.policy=none", "views.student=1", "loss.byol=0", "teacher=null"),
        *EASY_SSL_VIEWS,
    ],
    "maskclip": ["views.student=1", *MASKCLIP],
    "pixels": ["views.student=1", *MASKCLIP, "distill.targets=pixels", "teacher=null"],
    "everything": [
        *("loss.distill=1", "loss.mlm=0.2", "mlm.decoder_layers=1", "distill.targets=features"),
        *("mask.policy=inverse", *EASY_SSL_VIEWS),
    ],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_learns_and_gives_equal_losses_however_it_is_split(
    run_distributed, shards, tmp_path, family
):
    def run(name, ranks, **options):
        train = _train_in(tmp_path / name, shards, overrides=FAMILIES[family], **options)
        run_distributed(train, ranks, timeout=300)
        return [json.loads(line)["terms"] for line in open(tmp_path / name / "metrics.jsonl")]

    whole = run("whole", 1)
    assert sum(terms["loss"] for terms in whole[-5:]) < sum(terms["loss"] for terms in whole[:5])
    # Five steps: later, rounding decides which of two equally good blocks a mask keeps.
    split = run("split", 2, stage="3", micro_batch=4, stop_at=5)
    assert len(whole) == STEPS and len(split) == 5
    for one, other in zip(whole[:5], split, strict=True):
        assert other == pytest.approx(one, rel=2e-5)


def _train_in(run, shards, **options):
    return lambda: _train(run, shards, **options)


RESUMES = [  # ZeRO stage and ranks until the kill, then after it
    *(("0", 2, "0", 2), ("2", 2, "1", 1)),
    *(("3", 2, "1", 1), ("1", 1, "2", 2)),
]
IDS = [f"ZeRO-{a} on {m} to ZeRO-{b} on {n}" for a, m, b, n in RESUMES]


@pytest.mark.parametrize("stage, ranks, stage_after, ranks_after", RESUMES, ids=IDS)
def test_killed_run_continues_at_the_exact_next_sample(
    run_distributed, shards, tmp_path, stage, ranks, stage_after, ranks_after
):
    rng = np.random.default_rng(int(stage) + 10 * ranks_after)
    kill_at = int(rng.integers(7, STEPS))
    overrides = [f"train.checkpoint_every={5 * BATCH}"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_distributed(_train_in(whole, shards, stage=stage, overrides=overrides), ranks)
    with pytest.raises(Exception):  # noqa: B017 - the ranks are gone, however it is reported
        run_distributed(
            _train_in(killed, shards, stage=stage, overrides=overrides, kill_at=kill_at), ranks
        )
    run_distributed(_train_in(killed, shards, stage=stage_after, overrides=overrides), ranks_after)
    tolerance = EXACT if ranks == ranks_after else 1e-5
    assert _losses(killed) == pytest.approx(_losses(whole), rel=tolerance)
    before = _global_batches(killed, ranks)
    after = before if ranks_after == ranks else _global_batches(killed, ranks_after)
    expected = _global_batches(whole, ranks)
    assert max(after) == STEPS and len(before) >= 5
    for step, seen in [*before.items(), *after.items()]:
        assert seen == expected[step]


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
            with open(filler, "wb", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(bytes(1 << 16))
        if step == 12:  # after the checkpoint of step 10 failed
            found = checkpoint_folder.find(run / "checkpoints", "auto")
            seen["full"] = (found.name, checkpoint_folder.verify(found))
            filler.unlink()

    def train():
        overrides = [f"train.checkpoint_every={5 * BATCH}"]
        _train(run, shards, overrides=overrides, on_step=on_step, notes=notes)
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
    assert {13, STEPS} <= {json.loads(line)["step"] for line in lines}, "whole lines only"


def test_loss_that_is_not_finite_stops_every_rank_and_keeps_the_checkpoint(
    run_distributed, shards, tmp_path
):
    run = tmp_path / "run"
    run_distributed(_train_in(run, shards, stop_at=4), 2)

    def diverge():
        with pytest.raises(NonFiniteLoss) as caught:
            _train(run, shards, overrides=["optimizer.lr=1e30", "optimizer.warmup_start_lr=1e30"])
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


@pytest.mark.parametrize("stage", ["1", "3"])
def test_gradient_that_is_not_finite_stops_every_rank_too(run_distributed, shards, tmp_path, stage):
    run = tmp_path / "run"

    def overflow_in_step_3():
        total, losses = stepper.losses.total, []

        def with_overflow(*args):
            loss, terms = total(*args)
            losses.append(loss)
            return (Overflow.apply(loss) if len(losses) == 3 else loss), terms

        stepper.losses.total = with_overflow
        with pytest.raises(NonFiniteLoss) as caught:
            _train(run, shards, stage=stage, overrides=[f"train.checkpoint_every={2 * BATCH}"])
        return str(caught.value)

    for message in run_distributed(overflow_in_step_3, 2):
        assert "gradient of step 3" in message and "gradient_norm inf" in message
    folder = checkpoint_folder.find(run / "checkpoints", "auto")
    assert checkpoint.read_state(folder)["step"] == 2


def test_dropout_never_repeats_its_random_numbers(run_distributed, shards, tmp_path):
    def draw():
        states, get = [], stepper.get_random_state

        def remember():
            states.append(get()["cpu"])
            return get()

        stepper.get_random_state = remember
        dropping = (
            "model.image.kwargs={patch_size: 8, embed_dim: 24, depth: 2, num_heads: 2, "
            "proj_drop_rate: 0.1}"
        )
        after = []
        _train(
            tmp_path / "run",
            shards,
            micro_batch=4,
            overrides=[dropping],
            stop_at=1,
            on_step=lambda step: after.append(torch.get_rng_state()),
        )
        before_micro_batches = states[: BATCH // 2 // 4]
        assert len({bytes(state.numpy()) for state in [*before_micro_batches, *after]}) == 3
        return torch.initial_seed()

    assert run_distributed(draw, 2) == [0, 1], "ranks drop different places"


def test_evaluation_that_fails_at_the_end_costs_nothing_that_was_trained(
    run_distributed, shards, tmp_path
):
    def fail(trainer):
        if trainer.step:
            raise RuntimeError("no memory")
        return {"student": {"step": 0}}

    run, overrides = tmp_path / "run", ["train.epochs=2"]
    with pytest.raises(RuntimeError, match="no memory"):
        run_distributed(_train_in(run, shards, overrides=overrides, evaluator=fail), 2)
    folder = checkpoint_folder.find(run / "checkpoints", "auto")
    assert checkpoint.read_state(folder)["step"] == 10


def test_ranks_end_after_rank_0_has_uploaded(run_distributed, shards, tmp_path):
    words = ["--ds_config", str(tmp_path / "ds.json"), "--output", str(tmp_path / "run")]
    words += ["--train", str(Path(shards[0].url).parent / "*.tar"), *RECIPE, "train.epochs=2"]
    words += ["data.val=[]", f"train.upload_to=file://{tmp_path}/remote"]
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    last = tmp_path / "remote" / checkpoint_folder.LATEST

    def pretrain():
        upload = Uploader._upload

        def slow(*args):
            time.sleep(2)
            upload(*args)

        Uploader._upload = slow
        return run_module.pretrain(parse(words)), last.is_file()

    assert run_distributed(pretrain, 2) == [(0, True), (0, True)]


def test_ranks_that_see_other_data_are_refused(run_distributed, shards):
    def check(odd_one):
        mine = list(shards)
        if os.environ["RANK"] == "1":
            mine[2] = odd_one
        try:
            run_module._check_same_shards(mine)
        except ConfigError as error:
            return str(error)

    assert run_distributed(check, 2, shards[2]) == [None, None]
    for message in run_distributed(check, 2, replace(shards[2], num_samples=SHARD_SIZE - 1)):
        assert "80 samples on rank 0, but 4 with 79 on rank 1" in message


def test_run_that_is_made_longer_is_evaluated_at_its_new_end(run_distributed, shards, tmp_path):
    def evaluate(trainer):
        return {"student": {"step": trainer.step}}

    run = tmp_path / "run"
    for epochs, end in ((2, 10), (2, 10), (3, 15)):
        overrides = [f"train.epochs={epochs}"]
        run_distributed(_train_in(run, shards, overrides=overrides, evaluator=evaluate), 1)
        state = checkpoint.read_state(checkpoint_folder.find(run / "checkpoints", "auto"))
        assert state["evaluations"]["end"] == {"student": {"step": end}}


def test_resumed_run_keeps_its_wandb_id_and_a_report_that_fails_ends_no_run(
    run_distributed, shards, tmp_path, monkeypatch, capfd
):
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = tmp_path / "run"
    overrides = ["train.wandb=project"]
    for steps in (2, 3):  # without recipe.yaml, which only launch/pretrain.py writes
        train = _train_in(run, shards, overrides=overrides, stop_at=steps)
        run_distributed(train, 1)
        out = capfd.readouterr().out
        assert out.count("the report was not written: ConfigError: RUN is") == 1
    wandb_id = checkpoint.read_state(checkpoint_folder.find(run / "checkpoints", "auto"))[
        "wandb_id"
    ]
    folders = [path.name for path in (run / "wandb").glob("offline-run-*")]
    assert len(folders) == 2 and all(name.endswith(f"-{wandb_id}") for name in folders)


def test_checkpoint_of_other_data_or_batch_size_is_refused(run_distributed, shards, tmp_path):
    run = tmp_path / "run"
    run_distributed(_train_in(run, shards, stop_at=2), 1)

    def other_data():
        with pytest.raises(ConfigError, match="data.train"):
            _train(run, shards[:2])

    run_distributed(other_data, 1)
