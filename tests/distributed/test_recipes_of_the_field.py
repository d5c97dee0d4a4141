"""The recipes of the field's methods, each stage of them, on small towers under ZeRO 1, 2 and 3."""

import json

import pytest
from torch.utils.flop_counter import FlopCounterMode

from aclip.config.ds_config import read_ds_config
from aclip.config.recipe_file import load_recipe, stages_of
from aclip.data.synthetic import synthetic_batch
from aclip.distributed import rank, world_size
from aclip.engine.process_group import init_distributed
from aclip.planning.measure_step import measure_step
from aclip.planning.meter import FORMULAS
from aclip.training.stepper import Stepper

FIELD = ("aclip_clipf", "clipa", "clipf", "cluster", "flip", "glip", "lit", "siglip", "superclip")
TINY = [
    "model.image.resolution=64",
    "model.image.kwargs={embed_dim: 24, depth: 2, num_heads: 2}",
    "model.text={width: 16, heads: 2, layers: 1, context_length: 32}",
    "model.embed_dim=12",
]
BATCH, STEPS, RATE = 8, 8, 3e-3


def stages(name):
    """The recipe's stages with small towers and one batch size."""
    recipe = load_recipe(f"{name}_vitb16")
    overrides = [*TINY, *(["teacher.resolution=32"] if recipe.teacher else [])]
    every = stages_of(load_recipe(f"{name}_vitb16", overrides))
    sized = {"global_batch_size": BATCH}
    return [
        each.model_copy(update={"train": each.train.model_copy(update=sized)}) for each in every
    ]


def make_stepper(folder, recipe, stage):
    device = init_distributed()
    path = folder / f"ds-{stage}-{rank()}.json"
    zero = {"stage": stage, "stage3_param_persistence_threshold": 100}
    path.write_text(json.dumps({"zero_optimization": zero}))
    return Stepper(recipe, read_ds_config(str(path), BATCH, world_size()), device)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_stage_learns_one_batch_by_heart(run_distributed, tmp_path, stage):
    def train():
        found = {}
        for name in FIELD:
            for number, recipe in enumerate(stages(name), start=1):
                stepper = make_stepper(tmp_path, recipe, stage)
                batch = synthetic_batch(recipe, BATCH).split(BATCH // world_size())[rank()]
                losses = [
                    stepper.step(batch, RATE, recipe.average_momentum)["loss"] for _ in range(STEPS)
                ]
                found[f"{name} {number}"] = [loss.item() for loss in losses]
                stepper.engine.destroy()
        return found

    for found in run_distributed(train, 2):
        assert len(found) == len(FIELD) + 5  # five have a second stage
        for name, losses in found.items():
            assert losses[-1] < losses[0], (name, losses)


def test_what_a_step_computes_is_what_torch_counts(run_distributed, tmp_path):
    def count():
        found = {}
        for name in FIELD:
            for number, recipe in enumerate(stages(name), start=1):
                stepper = make_stepper(tmp_path, recipe, 0)
                batch = synthetic_batch(recipe, BATCH)
                measured = measure_step(recipe, batch, modes=("none",)).total_flops
                # Torch has no formula for a CPU's fused attention; test_flops.py has one by hand.
                with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
                    stepper.step(batch, RATE, recipe.average_momentum)
                found[f"{name} {number}"] = counter.get_total_flops() / (BATCH * measured)
        return found

    (found,) = run_distributed(count, 1)
    for name, ratio in found.items():
        assert ratio == pytest.approx(1, abs=0.01), name
