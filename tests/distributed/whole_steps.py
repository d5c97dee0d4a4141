"""Whole steps on tiny towers whose weights stay as they are: the terms, and their gradients."""

import json
from collections.abc import Callable
from pathlib import Path

import deepspeed
import torch
import torch.nn.functional as F
from small_recipe import SMALL_RECIPE
from torch import Tensor

from aclip.config.ds_config import read_ds_config
from aclip.config.recipe import Recipe
from aclip.config.recipe_file import load_recipe
from aclip.data.batch import Batch
from aclip.distributed import rank, world_size
from aclip.engine.process_group import init_distributed
from aclip.training.stepper import Stepper

BATCH = 8
TINY = [
    f"train.global_batch_size={BATCH}",
    "model.image.resolution=32",
    "model.image.kwargs={patch_size: 8, embed_dim: 24, depth: 2, num_heads: 2}",
    "model.text={width: 8, heads: 2, layers: 2, context_length: 16}",
    "model.embed_dim=11",
    "mask.policy=none",
    "teacher=null",
    "augment={jitter_prob: 0, grayscale_prob: 0, blur_prob: 0, solarize_prob: 0}",
]
TOWER = "image.vit.blocks.0.attn.qkv.weight"
SPLITS = {1: [("0", 8), ("0", 2)], 2: [("1", 2), ("2", 4), ("3", 2)]}
"""ZeRO stages and micro-batches by the number of ranks."""


def make_stepper(
    folder: Path, stage: str, micro_batch: int, overrides: list[str]
) -> tuple[Recipe, Stepper]:
    device = init_distributed()
    values = {
        "zero_optimization": {"stage": int(stage), "stage3_param_persistence_threshold": 100},
        "gradient_clipping": 0.0,
        "train_micro_batch_size_per_gpu": micro_batch,
    }
    path = folder / f"ds-{stage}-{micro_batch}-{rank()}.json"
    path.write_text(json.dumps(values))
    recipe = load_recipe(SMALL_RECIPE, [*TINY, *overrides])
    return recipe, Stepper(recipe, read_ds_config(str(path), BATCH, world_size()), device)


def run_steps(
    folder: Path,
    stage: str,
    micro_batch: int,
    overrides: list[str],
    batches: Callable[[Recipe], list[Batch]],
    followed: tuple[str, ...],
) -> tuple[list[dict[str, Tensor]], Stepper]:
    """Each step's terms, mean over the ranks, and the gradients of the weights that are followed.

    Args:
        batches: makes the global batches of the steps.
    """
    recipe, stepper = make_stepper(folder, stage, micro_batch, overrides)
    named = dict(stepper.engine.module.named_parameters())
    gradient = deepspeed.utils.safe_get_full_grad if int(stage) else lambda p: p.grad
    update, steps = stepper.engine.step, []

    def step_engine():
        steps.append({name: gradient(named[name]).float().clone() for name in followed})
        update()

    stepper.engine.step = step_engine
    for batch in batches(recipe):
        own = batch.split(BATCH // world_size())[rank()]
        for name, value in stepper.step(own, 0.0, None).items():
            if world_size() > 1:
                torch.distributed.all_reduce(value)
            steps[-1][name] = value / world_size()
    return steps, stepper


def plain_pixels(recipe: Recipe, batch: Batch) -> Tensor:
    """The views in float64, normalised: (B, V, 3, R, R)."""
    mean, std = (
        torch.tensor(values, dtype=torch.float64).view(3, 1, 1)
        for values in (recipe.augment.mean, recipe.augment.std)
    )
    return (batch.student_views.double() / 255 - mean) / std


def plain_contrastive(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    labels = torch.arange(BATCH)
    logits = scale * F.normalize(images, dim=1) @ F.normalize(texts, dim=1).T
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def assert_equal_steps(actual: list[dict[str, Tensor]], plain: list[dict[str, Tensor]]) -> None:
    """Values and gradients within 1e-5 of what the plain formula gives."""
    for step, expected in zip(actual, plain, strict=True):
        for name, value in expected.items():
            error = (step[name].double() - value).abs().max()
            assert error <= 1e-5 * value.abs().max(), name
            assert value.abs().max() > 1e-3
