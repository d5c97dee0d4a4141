"""The trainer on 1 and 2 ranks: equal losses for every stage and accumulation, exact resume."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from trainer_run import BATCH, SHARD_SIZE, STEPS, read_losses, run_trainer, train_in, write_shards

from aclip.data.find_data import check_same_shards
from aclip.errors import ConfigError
from aclip.models.student import Student
from aclip.run_folder.metrics_file import read_metrics

pytestmark = pytest.mark.distributed

STAGES = ("0", "1", "2", "3", "3_offload")
EXACT = 1e-6


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"))


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
    names = ("keys", "boxes", "colours", "noise")
    return {
        step: {name: sum((seen[step][name] for seen in per_rank), []) for name in names}
        for step in steps
    }


def test_losses_are_equal_for_every_stage_rank_count_and_accumulation(
    run_distributed, shards, tmp_path
):
    def run(name, ranks, **options):
        run_distributed(train_in(tmp_path / name, shards, **options), ranks, timeout=300)
        losses = read_losses(tmp_path / name)
        assert len(losses) == STEPS
        return losses, [line.gradient_norm for line in read_metrics(tmp_path / name).steps]

    expected, expected_norms = run("reference", 1)
    assert expected[-1] < expected[0]
    different = [run("accumulated", 1, micro_batch=4), run("two", 2)]
    different += [run(f"two-{stage}", 2, stage=stage, micro_batch=4) for stage in STAGES]
    for losses, norms in different:
        assert losses == pytest.approx(expected, rel=1e-4)
        assert norms == pytest.approx(expected_norms, rel=1e-2)


MASKCLIP = ["mask.policy=none", "loss.simclr=0", "loss.byol=0", "loss.distill=1", "loss.mlm=0.2"]
MASKCLIP += ["distill.num_codewords=32", "mlm.decoder_layers=1"]
EASY_SSL_VIEWS = ["views.ssl=2", "views.ssl_scale=[0.9, 1]", "views.ssl_flip_prob=0"]
EASY_SSL_VIEWS += ["ssl_augment={jitter_prob: 0, grayscale_prob: 0, blur_prob: 0}"]
SIGLIP = ["loss.contrastive=0", "loss.sigmoid=1", "loss.initial_logit_scale=10"]
NO_TEACHER = ["loss.simclr=0", "loss.byol=0", "teacher=null"]
FAMILIES = {
    "clip": ["mask.policy=none", "views.student=1", "loss.simclr=0", "loss.byol=0", "teacher=null"],
    "slip": [
        "mask.policy=none",
        "views.student=1",
        "loss.byol=0",
        "teacher=null",
        *EASY_SSL_VIEWS,
    ],
    "siglip": ["mask.policy=none", "loss.simclr=0", "loss.byol=0", "teacher=null", *SIGLIP],
    "cluster": [
        "loss.simclr=0",
        "loss.byol=0",
        "teacher=null",
        "mask.policy=cluster",
        "mask.cluster_embeddings=1",
        "mask.keep_ratio=0.25",
        "mask.keep_ratio_end=1",
    ],
    "superclip": ["mask.policy=none", *NO_TEACHER, "loss.words=1"],
    "maskclip": ["views.student=1", *MASKCLIP],
    "pixels": ["views.student=1", *MASKCLIP, "distill.targets=pixels", "teacher=null"],
    "everything": [
        "loss.distill=1",
        "loss.mlm=0.2",
        "mlm.decoder_layers=1",
        "distill.targets=features",
        "mask.policy=inverse",
        *EASY_SSL_VIEWS,
    ],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_learns_and_gives_equal_losses_however_it_is_split(
    run_distributed, shards, tmp_path, family
):
    def run(name, ranks, **options):
        train = train_in(tmp_path / name, shards, overrides=FAMILIES[family], **options)
        run_distributed(train, ranks, timeout=300)
        return [json.loads(line)["terms"] for line in open(tmp_path / name / "metrics.jsonl")]

    whole = run("whole", 1)
    assert sum(terms["loss"] for terms in whole[-5:]) < sum(terms["loss"] for terms in whole[:5])
    # Five steps: later, rounding decides which of two equally good blocks a mask keeps.
    split = run("split", 2, stage="3", micro_batch=4, stop_at=5)
    assert len(whole) == STEPS and len(split) == 5
    for one, other in zip(whole[:5], split, strict=True):
        assert other == pytest.approx(one, rel=2e-5)


RESUMES = [  # ZeRO stage and ranks until the kill, then after it; what the mask does meanwhile
    ("0", 2, "0", 2, ["mask.keep_ratio=0.25", "mask.keep_ratio_end=1"]),
    ("2", 2, "1", 1, ["mask.warmup=0.7"]),
    ("3", 2, "1", 1, ["mask.temperature=1", "loss.words=1"]),
    ("1", 1, "2", 2, ["mask.warmup=0.9", "mask.warmup_change=gradual"]),
]
IDS = [f"ZeRO-{a} on {m} to ZeRO-{b} on {n}" for a, m, b, n, _ in RESUMES]


@pytest.mark.parametrize("stage, ranks, stage_after, ranks_after, mask", RESUMES, ids=IDS)
def test_killed_run_continues_at_the_exact_next_sample(
    run_distributed, shards, tmp_path, stage, ranks, stage_after, ranks_after, mask
):
    rng = np.random.default_rng(int(stage) + 10 * ranks_after)
    kill_at = int(rng.integers(7, STEPS))
    overrides = [f"train.checkpoint_every={5 * BATCH}", *mask]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_distributed(train_in(whole, shards, stage=stage, overrides=overrides), ranks)
    with pytest.raises(Exception):  # noqa: B017 - the ranks are gone, however it is reported
        run_distributed(
            train_in(killed, shards, stage=stage, overrides=overrides, kill_at=kill_at), ranks
        )
    run_distributed(train_in(killed, shards, stage=stage_after, overrides=overrides), ranks_after)
    tolerance = EXACT if ranks == ranks_after else 1e-5
    assert read_losses(killed) == pytest.approx(read_losses(whole), rel=tolerance)
    before = _global_batches(killed, ranks)
    after = before if ranks_after == ranks else _global_batches(killed, ranks_after)
    expected = _global_batches(whole, ranks)
    assert max(after) == STEPS and len(before) >= 5
    for step, seen in [*before.items(), *after.items()]:
        assert seen == expected[step]


def test_dropout_never_repeats_its_random_numbers(run_distributed, shards, tmp_path):
    def draw():
        states, encode = [], Student.encode

        def remember(student, inputs):
            states.append(bytes(torch.get_rng_state().numpy()))
            return encode(student, inputs)

        Student.encode = remember
        dropping = (
            "model.image.kwargs={patch_size: 8, embed_dim: 24, depth: 2, num_heads: 2, "
            "proj_drop_rate: 0.1}"
        )
        after = []
        run_trainer(
            tmp_path / "run",
            shards,
            micro_batch=4,
            overrides=[dropping],
            stop_at=1,
            on_step=lambda step: after.append(bytes(torch.get_rng_state().numpy())),
        )
        first, last, first_again = states
        assert first == first_again, "the gradient is that of the features which the losses saw"
        assert len({first, last, *after}) == 3
        return torch.initial_seed()

    assert run_distributed(draw, 2) == [0, 1], "ranks drop different places"


def test_ranks_that_see_other_data_are_refused(run_distributed, shards):
    def check(odd_one):
        mine = list(shards)
        if os.environ["RANK"] == "1":
            mine[2] = odd_one
        try:
            check_same_shards(mine)
        except ConfigError as error:
            return str(error)

    assert run_distributed(check, 2, shards[2]) == [None, None]
    for message in run_distributed(check, 2, replace(shards[2], num_samples=SHARD_SIZE - 1)):
        assert "80 samples on rank 0, but 4 with 79 on rank 1" in message


def test_checkpoint_of_other_data_or_batch_size_is_refused(run_distributed, shards, tmp_path):
    run = tmp_path / "run"
    run_distributed(train_in(run, shards, stop_at=2), 1)

    def other_data():
        with pytest.raises(ConfigError, match="data.train"):
            run_trainer(run, shards[:2])

    def other_order():
        with pytest.raises(ConfigError, match="train.seed is 1, but .* was trained with 0"):
            run_trainer(run, shards, overrides=["train.seed=1"])

    run_distributed(other_data, 1)
    run_distributed(other_order, 1)
    state = json.loads((run / f"checkpoints/samples-{2 * BATCH:012d}/state.json").read_text())
    data = state["data"]
    assert len(data.pop("sha256")) == 64
    sizes = [Path(shard.url).stat().st_size for shard in shards]
    assert [mark.partition("-")[0] for mark in data.pop("marks")] == list(map(str, sizes))
    assert data == {
        "shards": 4,
        "samples": 4 * SHARD_SIZE,
        "order": 2,
        "train.seed": 0,
        "data.shuffle_block": 160,  # the demo recipe's
        "data.lanes": BATCH,
    }
