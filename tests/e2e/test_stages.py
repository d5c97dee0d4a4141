"""A run of two stages, killed in the first, at the change and in the second."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from shard_files import write_shard

pytestmark = pytest.mark.e2e

TOWERS = {
    "image": {
        "name": "vit_tiny_patch16_224",
        "resolution": 32,
        "kwargs": {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3},
        "freeze_patch_embed": False,
    },
    "text": {"width": 32, "heads": 2, "layers": 1, "context_length": 16},
    "embed_dim": 16,
}
RECIPE = {
    "description": "two stages",
    "model": TOWERS,
    "mask": {"policy": "attentive", "keep_ratio": 0.5, "block_size": 1},
    "views": {"student": 1},
    "teacher": {"resolution": 32},
    "loss": {"simclr": 0, "byol": 0},
    "optimizer": {"lr": 1e-3, "keep_state": False},
    "train": {
        "global_batch_size": 4,
        "epochs": 1,
        "warmup_epochs": 0,
        "log_every": 1,
        "checkpoint_every": 8,
        "keep_checkpoints": 9,
        "seed": 5,
    },
    "stages": [
        {
            "model": {"image": {"resolution": 64}},
            "mask": {"policy": "none"},
            "teacher": None,
            "optimizer": {"lr": 1e-4, "keep_state": True},
            "train": {"global_batch_size": 8, "samples": 32},
        }
    ],
}
CHANGE, END = 24, 56


@pytest.fixture
def arguments(tmp_path) -> list[str]:
    write_shard(tmp_path / "train.tar", 24)
    write_shard(tmp_path / "val.tar", 4)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    return [
        *("--ds_config", "ds_configs/zero0.json", "--recipe", str(tmp_path / "recipe.yaml")),
        *("--train", str(tmp_path / "train.tar"), "--val", str(tmp_path / "val.tar")),
    ]


def test_killed_in_any_stage_or_at_the_change_equals_uninterrupted(launcher, arguments, tmp_path):
    whole = tmp_path / "whole"
    result = launcher.run(*arguments, "--output", str(whole), launcher=False)
    assert result.status == 0, result.output
    assert "two stages, stage 1: 6 steps of 4 images on 2 ranks" in result.output
    assert "two stages, stage 2: 4 steps of 8 images on 2 ranks" in result.output
    assert "step 10/10  56 samples (100.0 %)" in result.output
    expected = _steps(whole)
    assert [(samples, step) for step, (samples, _) in expected.items()] == [
        *((4 * step, step) for step in range(1, 7)),
        *((CHANGE + 8 * step, 6 + step) for step in range(1, 5)),
    ]
    changed = yaml.safe_load((whole / f"recipe-samples-{CHANGE:012d}.yaml").read_text())
    assert changed["model"]["image"]["resolution"] == 64 and changed["train"]["seed"] == 6
    report = (whole / "report.md").read_text()
    assert f"Recipe from {CHANGE} samples on: " in report
    assert "model.image.resolution 32 -> 64" in report and "mask.policy attentive -> none" in report
    for at in (8, CHANGE, 40):
        folder = tmp_path / str(at)
        _cut_off_after(whole, folder, at)
        if at == CHANGE:
            _forget_evaluation(folder / "checkpoints" / f"samples-{CHANGE:012d}")
        again = launcher.run(*arguments, "--output", str(folder), ranks=1, launcher=False)
        assert again.status == 0, again.output
        actual = _steps(folder)
        assert actual.keys() == expected.keys()
        for step, (samples, loss) in expected.items():
            assert actual[step] == (samples, pytest.approx(loss, rel=1e-4))
        _assert_same_weights(whole, folder)
        evaluations = _evaluations(folder)
        assert evaluations.keys() == {"before", f"{CHANGE} samples", "end"}
        for when, models in _evaluations(whole).items():
            assert evaluations[when]["student"] == pytest.approx(models["student"])
    _assert_both_can_be_used(launcher, arguments, whole)


def _steps(run: Path) -> dict[int, tuple[int, float]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {r["step"]: (r["samples"], r["terms"]["loss"]) for r in lines if "terms" in r}


def _cut_off_after(whole: Path, folder: Path, samples: int) -> None:
    """A copy of the run as a kill leaves it whose last checkpoint is that at `samples`."""
    shutil.copytree(whole, folder)
    for checkpoint in (folder / "checkpoints").glob("samples-*"):
        if int(checkpoint.name.removeprefix("samples-")) > samples:
            shutil.rmtree(checkpoint)
    (folder / "checkpoints" / "latest").write_text(f"samples-{samples:012d}")
    if samples < CHANGE:
        (folder / f"recipe-samples-{CHANGE:012d}.yaml").unlink()


def _forget_evaluation(checkpoint: Path) -> None:
    """What a kill leaves between the last step of a stage and its evaluation."""
    path = checkpoint / "state.json"
    state = json.loads(path.read_text())
    del state["evaluations"][f"{CHANGE} samples"]
    path.write_text(json.dumps(state))
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    manifest["state.json"] = {"bytes": path.stat().st_size, "sha256": sha256}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def _evaluations(run: Path) -> dict[str, dict]:
    state = run / "checkpoints" / f"samples-{END:012d}" / "state.json"
    return json.loads(state.read_text())["evaluations"]


def _assert_both_can_be_used(launcher, arguments: list[str], run: Path) -> None:
    """Each with the grid that it was trained with; a complete run prints its table once more, and
    takes no other stages."""
    again = launcher.run(*arguments, "--output", str(run), ranks=1, launcher=False)
    assert again.status == 0 and "building the towers" not in again.output
    for at in (CHANGE, END):
        checkpoint = run / "checkpoints" / f"samples-{at:012d}"
        words = [str(checkpoint), "--out", str(run / f"export-{at}"), "--format", "safetensors"]
        done = launcher.run(*words, script="export.py", ranks=1, launcher=False)
        assert done.status == 0, done.output
    other = launcher.run(
        *arguments, "--output", str(run), "stages.0.mask.policy=random", ranks=1, launcher=False
    )
    assert other.status == 2 and 'mask.policy "none" -> "random"' in other.output
    shorter = launcher.run(*arguments, "--output", str(run), "stages=[]", ranks=1, launcher=False)
    assert shorter.status == 2 and "of stage 2 of its run" in shorter.output


def _assert_same_weights(whole: Path, folder: Path) -> None:
    place = Path("checkpoints") / f"samples-{END:012d}" / "student.safetensors"
    expected, actual = load_file(whole / place), load_file(folder / place)
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        if name.endswith(("qkv.bias", "k_proj.bias")):
            continue  # a key's bias has no gradient but rounding, which Adam scales to a whole step
        torch.testing.assert_close(actual[name], tensor, rtol=1e-3, atol=2e-6, msg=name)
