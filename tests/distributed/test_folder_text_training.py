"""Training with a text tower out of a folder: any number of ranks and any stage of ZeRO alike."""

import pytest
import torch
from safetensors.torch import load_file
from text_folders import write_text_folder
from trainer_run import read_losses, train_in, write_shards

pytestmark = pytest.mark.distributed

NO_TEACHER = ["mask.policy=random", "teacher=null", "loss.simclr=0", "loss.byol=0"]
WITH_TEACHER = ["loss.simclr=0", "loss.byol=2"]
STEPS = 5
MODEL = "model.safetensors"


@pytest.mark.parametrize(
    "kind, overrides, stages",
    [
        pytest.param("gpt2", NO_TEACHER, "3", id="causal"),
        pytest.param("bert", WITH_TEACHER, "13", id="bidirectional, with an average"),
    ],
)
def test_losses_and_weights_are_equal(run_distributed, tmp_path, kind, overrides, stages):
    shards = tmp_path / "shards"
    shards.mkdir()
    shards = write_shards(shards)
    folder = write_text_folder(tmp_path / "folder", kind)
    text = f"model.text={{name: {folder}, context_length: 16}}"

    def run(ranks, stage):
        out = tmp_path / f"{ranks}-{stage}"
        options = {"stage": stage, "stop_at": STEPS, "overrides": [*overrides, text]}
        run_distributed(train_in(out, shards, **options), ranks, timeout=300)
        (checkpoint,) = (out / "checkpoints").glob("samples-*")
        return read_losses(out), load_file(checkpoint / "student.safetensors")

    expected, weights = run(1, "0")
    assert len(expected) == STEPS and expected[-1] < expected[0]
    before = {f"text.transformer.{n}": w for n, w in load_file(folder / MODEL).items()}
    own = before.keys() & weights.keys()
    moved = [name for name in own if not torch.equal(weights[name], before[name])]
    assert len(moved) > len(own) // 2
    for stage in stages:
        losses, own = run(2, stage)
        assert losses == pytest.approx(expected, rel=1e-4)
        for name, weight in weights.items():
            # A key's bias has no gradient but rounding noise, which Adam blows up.
            if "key.bias" not in name and "c_attn.bias" not in name:
                assert (own[name] - weight).abs().max() <= 1e-3, name
