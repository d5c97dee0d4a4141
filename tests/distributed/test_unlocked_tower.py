"""A tower that a stage unlocks gets the optimizer's state of its like, and training goes on."""

import pytest
import torch
from safetensors import safe_open
from whole_steps import BATCH, make_stepper

from aclip.data.synthetic import synthetic_batch
from aclip.engine.host_copy import HostBuffers
from aclip.run_folder.checkpoint_folder import OPTIMIZER
from aclip.training import checkpoint

pytestmark = pytest.mark.distributed

MATRIX = "text.transformer.encoder.layers.1.self_attn.q_proj.weight"
LOSSES = ["loss.simclr=0", "loss.byol=0", "optimizer.keep_state=true"]
KEPT = {
    "muon": ({"momentum_buffer"}, {"exp_avg", "exp_avg_sq"}),
    "lion": ({"exp_avg"}, {"exp_avg"}),
}
"""Of a matrix of a block, and of its bias."""


def save(stepper, root, samples):
    state = {"samples": samples}
    content = checkpoint.gather(stepper.engine, stepper.teacher, state, HostBuffers())
    return checkpoint.write(root, content, checkpoint.collect(content, None))


@pytest.mark.parametrize("stage", ["0", "1", "3"])
@pytest.mark.parametrize("name", KEPT)
def test_what_was_locked_has_the_state_of_its_like(run_distributed, tmp_path, name, stage):
    def train():
        def build(*overrides):
            overrides = [*LOSSES, f"optimizer.name={name}", *overrides]
            return make_stepper(tmp_path, stage, BATCH, overrides)

        recipe, locked = build("optimizer.text.lr_scale=0")
        batch = synthetic_batch(recipe, BATCH)
        locked.step(batch, 1e-3, None)
        left = save(locked, tmp_path / "before", 8)
        _, unlocked = build()
        unlocked.begin_stage(left)
        unlocked.step(batch, 1e-3, None)
        folder = save(unlocked, tmp_path / "after", 16)  # which counts alike for all parameters
        with safe_open(folder / OPTIMIZER, "pt") as file:
            keys = set(file.keys())
        _, again = build()
        again.load(folder, 2)
        losses = [each.step(batch, 1e-3, None)["loss"] for each in (unlocked, again)]
        return keys, torch.stack(losses).tolist()

    ((keys, (loss, loss_again)),) = run_distributed(train, 1)
    of_matrix, of_bias = KEPT[name]
    assert {key for key in keys if key.startswith(f"{MATRIX}/")} == {
        f"{MATRIX}/{kind}" for kind in of_matrix
    }
    bias = MATRIX.replace("weight", "bias")
    assert {key for key in keys if key.startswith(f"{bias}/")} == {
        f"{bias}/{kind}" for kind in of_bias
    }
    assert loss_again == pytest.approx(loss, rel=1e-5)
