"""What a run starts from is known before anything costs time."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from small_recipe import SMALL_RECIPE

from aclip.config.recipe_file import load_recipe
from aclip.data.shards.listing import Shard
from aclip.distributed import default_to_one_rank
from aclip.errors import ConfigError
from aclip.training.stage import Stage, StagePlace

CODE = """
import sys
from aclip.config.arguments import parse
from aclip.training.start import check_start

import aclip.training.pretrain

start = check_start(parse(sys.argv[1:]))
stage = start.stages[0]
print([shard.num_samples for shard in stage.shards], stage.val_shards, start.resume_from)
print(stage.recipe.data.crops)
print(sorted(sys.modules.keys() & {"deepspeed", "timm", "open_clip"}))
"""


def test_all_is_checked_without_deepspeed_and_without_a_tower(write_tar, encode_image, tmp_path):
    members = []
    for number in range(4):
        members.append((f"{number}.jpg", encode_image(40, 40, number)))
        members.append((f"{number}.txt", b"words"))
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    words = ["--ds_config", str(tmp_path / "ds.json"), "--output", str(tmp_path / "run")]
    words += ["--train", write_tar("a.tar", members), "train.global_batch_size=2"]
    done = subprocess.run([sys.executable, "-c", CODE, *words], capture_output=True, text=True)
    assert done.stdout.splitlines()[-3:] == ["[4] [] None", "worker", "[]"], done.stderr
    assert (tmp_path / "run").is_dir()


def test_a_run_says_at_its_start_what_an_epoch_leaves_to_the_next(capsys):
    from aclip.training.checked_run import print_headline

    stage = Stage(
        load_recipe(SMALL_RECIPE, ["train.global_batch_size=8"]),
        SimpleNamespace(dtype="fp32", micro_batch_size=8, num_micro_steps=1, stage=0),
        shards=[Shard("a.tar", 20), Shard("b.tar", 9)],
        val_shards=[],
    )
    trainer = SimpleNamespace(
        num_steps=7,
        device=torch.device("cpu"),
        stepper=SimpleNamespace(init_report=None),
        run_folder="runs/x",
    )
    print_headline(stage, trainer, None)
    first, *rest = capsys.readouterr().out.splitlines()
    assert first.endswith(
        "each view keeps 0.5 of its patches (mask.policy attentive); run folder runs/x"
    )
    assert rest == [
        "an epoch of 29 samples is 3 batches of 8; the 5 left over begin the next epoch"
    ]


def test_a_run_that_went_on_without_a_validation_set_ends_without_a_table(tmp_path, capsys):
    from aclip.training.pretrain import print_results

    evaluations = {"before": {"student": {"zero_shot_top1": 0.1}}}
    print_results(tmp_path, 8, evaluations)
    assert capsys.readouterr().out == f"the run is complete: {tmp_path}\n"
    print_results(tmp_path, 8, evaluations | {"end": {"student": {"zero_shot_top1": 0.5}}})
    assert "50.0%" in capsys.readouterr().out


def test_each_stage_says_where_its_learning_rate_only_rises(capsys):
    from aclip.training.start import check_warmup

    def check(*overrides, number=1):
        recipe = load_recipe(SMALL_RECIPE, ["train.warmup_epochs=1", *overrides])
        check_warmup(Stage(recipe, None, [Shard("a.tar", 1000)], [], StagePlace(number)))
        return capsys.readouterr().out

    assert check("train.epochs=2") == check("train.samples=1001", number=2) == ""
    assert "is 1 and train.epochs 0.5 in stage 2, so" in check("train.epochs=0.5", number=2)
    assert "is 1 and train.samples 500, so" in check("train.samples=500")
    late = ["optimizer.schedule=constant", "optimizer.cooldown=0.6", "train.epochs=1"]
    assert check(*late, "train.samples=2500") == "", "which are two epochs and a half"
    with pytest.raises(ConfigError, match="cooldown is 0.6, but the warm-up already takes 50%"):
        check(*late, "train.samples=2000")


def test_a_run_says_which_evaluations_it_ends_before(capsys):
    from aclip.training.start import check_evaluate_at

    # 15 steps of 64 in this stage, between 500 samples before it and 300 behind it.
    place = StagePlace(2, samples=500, steps=5, rest_samples=300, rest_steps=3)
    for points, said in (("[900, 1760]", ""), ("[900, 1761, 5000]", "1,761, 5,000 samples")):
        changes = [f"train.evaluate_at={points}", "train.samples=960"]
        recipe = load_recipe(SMALL_RECIPE, ["train.global_batch_size=64", *changes])
        check_evaluate_at(Stage(recipe, None, [Shard("a.tar", 1000)], [], place))
        output = capsys.readouterr().out
        assert (said in output and "ends after 1,760" in output) if said else output == ""


@pytest.fixture
def no_rank(monkeypatch):
    """An environment that names no rank, and gets none that outlives the test."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.parametrize(
    "starter, size, number",
    [
        ("srun", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
        ("mpirun", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
        ("mpiexec", "PMI_SIZE", "PMI_RANK"),
    ],
)
def test_tasks_that_know_no_rank_are_pointed_to_the_launcher(no_rank, starter, size, number):
    no_rank.setenv(size, "4")
    no_rank.setenv(number, "3")
    with pytest.raises(ConfigError) as raised:
        default_to_one_rank()
    words = str(raised.value)
    assert words.startswith(f"{size} is 4: {starter} has started this command as task 3 of 4")
    assert "launch/slurm.sbatch" in words and "deepspeed launch/" in words
    no_rank.setenv("RANK", "3")  # DeepSpeed's launcher, started by them
    default_to_one_rank()
    no_rank.delenv("RANK")
    no_rank.setenv(size, "1")  # one task, such as a shell in an allocation
    default_to_one_rank()


def test_a_locked_tower_needs_weights_to_start_from():
    from aclip.training.start import check_locked

    overrides = ["optimizer.text.lr_scale=0"]
    with pytest.raises(ConfigError, match=r"optimizer.text.lr_scale is 0, but no --init gives"):
        check_locked(load_recipe("clip_vitb16", overrides))
    check_locked(load_recipe("clip_vitb16", [*overrides, "model.init=weights.pt"]))
    folder = "model.text={name: /bert, width: 512}"
    check_locked(load_recipe("clip_vitb16", [*overrides, folder]))  # has weights of its own
    with pytest.raises(ConfigError, match=r"optimizer.text.lr_scale is 0, but no --init gives"):
        random = "model.text.pretrained=false"
        check_locked(load_recipe("clip_vitb16", [*overrides, folder, random]))
    check_locked(load_recipe("clip_vitb16"))
