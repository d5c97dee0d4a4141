"""The optimizer's parameter groups, defaults, refusals and plans, and Muon beside torch's."""

import json

import pytest
import torch
from recipe_refusal import refusal
from small_recipe import SMALL_RECIPE
from torch import nn

from aclip.config.ds_config import read_ds_config
from aclip.config.optimizer import OptimizerConfig, check_with_ds_config
from aclip.config.recipe_file import load_recipe
from aclip.data.synthetic import batch_of_mean_captions
from aclip.engine.muon import Muon
from aclip.engine.optimizer import parameter_groups, student_groups
from aclip.errors import ConfigError
from aclip.models.student import build_student
from aclip.planning.measure_step import META
from aclip.planning.run_memory import checkpoint_copies
from aclip.planning.trace_step import UPDATE, trace_step
from aclip.planning.workload import describe_workload
from aclip.planning.zero_memory import ZeroSettings, zero_states

# The small recipe's towers: four blocks of 96 and two of 96 channels.
LOCKED = "optimizer.image={lr_scale: 0}"
ALONE = ["teacher=null", "mask.policy=random", "loss.byol=0", "loss.simclr=0"]


def groups_of(*overrides):
    """The groups of the small recipe, with the names of their parameters."""
    recipe = load_recipe(SMALL_RECIPE, list(overrides))
    with META:
        student = build_student(recipe)
    names = {p: name for name, p in student.named_parameters()}
    groups = student_groups(student, recipe.optimizer)
    return student, [{**g, "params": [names[p] for p in g["params"]]} for g in groups]


def rate_of(groups, name):
    return next(group["lr_scale"] for group in groups if name in group["params"])


def test_adamw_has_the_two_groups_that_it_always_had():
    student, groups = groups_of()
    names = {p: name for name, p in student.named_parameters()}
    before = parameter_groups(
        student, weight_decay=load_recipe(SMALL_RECIPE).optimizer.weight_decay
    )
    assert [g["params"] for g in groups] == [[names[p] for p in g["params"]] for g in before]
    assert [g["weight_decay"] for g in groups] == [g["weight_decay"] for g in before]
    assert [g["lr_scale"] for g in groups] == [1.0, 1.0]


def test_rates_fall_from_block_to_block():
    _, groups = groups_of("optimizer.image={layer_decay: 0.5}", "optimizer.text.lr_scale=0.1")
    image, text = "image.vit.", "text.transformer."
    by_hand = {
        f"{image}cls_token": 0.5**5,
        f"{image}pos_embed": 0.5**5,
        f"{image}patch_embed.proj.weight": 0.5**5,
        f"{image}blocks.0.norm1.bias": 0.5**4,
        f"{image}blocks.1.attn.qkv.weight": 0.5**3,
        f"{image}blocks.3.mlp.fc2.weight": 0.5,
        f"{image}norm.weight": 1.0,
        "image_projection.weight": 1.0,
        "logit_scale.log_logit_scale": 1.0,
        f"{text}embeddings.token_embedding.weight": 0.1,
        f"{text}encoder.layers.1.mlp.fc1.weight": 0.1,
        "text_projection.weight": 1.0,
    }
    assert {name: rate_of(groups, name) for name in by_hand} == pytest.approx(by_hand)
    assert len({name for group in groups for name in group["params"]}) == sum(
        len(group["params"]) for group in groups
    )


def test_muon_takes_the_matrices_of_the_blocks_alone():
    _, groups = groups_of("optimizer.name=muon")
    matrices = {name for g in groups if g["orthogonal"] for name in g["params"]}
    image = {f"image.vit.blocks.{i}" for i in range(4)}
    text = {f"text.transformer.encoder.layers.{i}" for i in range(2)}
    parts = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    of_text = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj")
    assert matrices == {f"{block}.{part}.weight" for block in image for part in parts} | {
        f"{block}.{part}.weight" for block in text for part in (*of_text, "mlp.fc1", "mlp.fc2")
    }


def test_a_locked_tower_is_in_no_group():
    student, groups = groups_of(LOCKED, *ALONE)
    assert not any(name.startswith("image.") for g in groups for name in g["params"])
    assert student.image_projection.weight.requires_grad


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
def test_muon_is_that_of_torch(shape):
    torch.manual_seed(0)
    weight, bias = torch.randn(shape), torch.randn(3)
    ours, theirs = [[nn.Parameter(each.clone()) for each in (weight, bias)] for _ in range(2)]
    settings = {"lr": 0.1, "weight_decay": 0.2}
    groups = [
        {"params": [ours[0]], "orthogonal": True, **settings},
        {"params": [ours[1]], "orthogonal": False, **settings},
    ]
    optimizer = Muon(groups, betas=(0.9, 0.98), eps=1e-8)
    references = [
        torch.optim.Muon([theirs[0]], adjust_lr_fn="match_rms_adamw", **settings),
        torch.optim.AdamW([theirs[1]], betas=(0.9, 0.98), eps=1e-8, **settings),
    ]
    for _ in range(3):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        for each in (optimizer, *references):
            each.step()
    # Both orthogonalise in bf16, in products of another order.
    assert (ours[0] - theirs[0]).abs().max() < 0.02 * (theirs[0] - weight).abs().max()
    assert torch.equal(ours[1], theirs[1])


def test_each_optimizer_has_its_own_betas_unless_they_are_given():
    def betas(*overrides, recipe="clip_vitb16"):
        optimizer = load_recipe(recipe, list(overrides)).optimizer
        return optimizer.betas, optimizer.eps

    assert betas() == ((0.9, 0.98), 1e-8)
    assert betas("optimizer.name=lion") == ((0.9, 0.99), 1e-8)
    assert betas("optimizer.name=lamb") == ((0.9, 0.999), 1e-6)
    assert betas("optimizer.name=muon") == ((0.9, 0.98), 1e-8)
    assert betas("optimizer.name=lion", recipe="siglip_vitb16")[0] == (0.9, 0.95)
    assert betas("optimizer.name=lamb", "optimizer.eps=1e-7")[1] == 1e-7


@pytest.mark.parametrize(
    "overrides, named",
    [
        (["optimizer.name=sgd"], ["optimizer.name is 'sgd'", "muon"]),
        (["optimizer.cooldown=0.2"], ["optimizer.cooldown is 0.2", "cosine"]),
        (["optimizer.cooldown_shape=1-sqrt"], ["optimizer.cooldown_shape is 1-sqrt"]),
        (
            ["optimizer.schedule=constant", "optimizer.cooldown=0.99", "train.warmup_epochs=10"],
            ["optimizer.cooldown is 0.99", "train.warmup_epochs 10"],
        ),
        ([LOCKED, "loss.byol=2"], ["optimizer.image.lr_scale is 0", "loss.byol"]),
        (
            ["optimizer.image={lr_scale: 0, layer_decay: 0.5}", *ALONE],
            ["optimizer.image.layer_decay is 0.5", "locks the tower"],
        ),
        (
            [LOCKED, "optimizer.text.lr_scale=0", *ALONE],
            ["optimizer.image.lr_scale and optimizer.text.lr_scale is 0", "loss.contrastive"],
        ),
        (["train.average=0.9"], ["train.average is 0.9", "teacher.momentum", "train.average=0"]),
        (["optimizer.image.layer_decay=0"], ["optimizer.image.layer_decay is 0"]),
    ],
)
def test_what_means_nothing_is_refused(overrides, named):
    message = refusal(*overrides)
    for word in named:
        assert word in message, message


def ds_config(folder, stage, offload=False):
    zero = {"stage": stage} | ({"offload_optimizer": {"device": "cpu"}} if offload else {})
    path = folder / "ds.json"
    path.write_text(json.dumps({"zero_optimization": zero}))
    return read_ds_config(str(path), 8, 1)


def test_what_zero_would_run_wrongly_is_refused_with_the_stage_to_take(tmp_path):
    for stage in (1, 2, 3):
        with pytest.raises(ConfigError, match=f"lamb.*stage is {stage} in .*take stage 0"):
            check_with_ds_config(OptimizerConfig(name="lamb"), ds_config(tmp_path, stage))
    with pytest.raises(ConfigError, match="muon.*offload_optimizer.*take stage 1, 2 or 3 without"):
        check_with_ds_config(OptimizerConfig(name="muon"), ds_config(tmp_path, 3, offload=True))
    for name, stage, offload in (("lamb", 0, False), ("lion", 3, True), ("muon", 3, False)):
        check_with_ds_config(OptimizerConfig(name=name), ds_config(tmp_path, stage, offload))


def test_memory_counts_what_each_optimizer_keeps():
    # Ten elements with two moments, thirty with one; a rank of two holds half of each.
    groups, moments = [[10], [30]], [2, 1]
    without = ZeroSettings(0, 2, dtype_bytes=4, accumulation_bytes=4)
    assert zero_states(groups, [], without, moments).optimizer == 4 * (2 * 10 + 30)
    for stage in (1, 2, 3):
        halves = ZeroSettings(stage, 2, dtype_bytes=2, accumulation_bytes=4)
        # Masters too; groups of 10 and 30 are padded to 12 and 32, ZeRO-3 pads nothing here.
        ten, thirty = (5, 15) if stage == 3 else (6, 16)
        expected = 4 * (3 * ten + 2 * thirty)
        assert zero_states(groups, [], halves, moments).optimizer == expected
    student = nn.Sequential(nn.Linear(5, 2, bias=False), nn.Linear(5, 6, bias=False))
    kept = dict(zip(student.parameters(), moments, strict=True))
    assert checkpoint_copies(student, [], kept).size == 4 * (3 * 10 + 2 * 30)


def products(m, n):
    """FLOPs of five iterations: X X', its square, and their sum times X."""
    short, long = sorted((m, n))
    return 5 * (2 * short * short * long + 2 * short**3 + 2 * short * short * long)


def test_muons_products_are_in_the_plan():
    recipe = load_recipe(SMALL_RECIPE, ["optimizer.name=muon"])
    batch = batch_of_mean_captions(recipe, 12, recipe.model.text.context_length)
    trace = trace_step(recipe, batch)
    image = products(288, 96) + products(96, 96) + 2 * products(384, 96)
    text = 4 * products(96, 96) + 2 * products(384, 96)
    flops = sum(each.flops for each in trace.operations if each.part == UPDATE)
    assert flops == 4 * image + 2 * text
    assert sorted(trace.num_moments) == [1, 2, 2]


def test_a_locked_tower_costs_no_backward_pass_and_no_state():
    recipe = load_recipe(SMALL_RECIPE, [LOCKED, *ALONE, "train.average=0.9"])
    batch = batch_of_mean_captions(recipe, 12, recipe.model.text.context_length)
    workload = describe_workload(recipe, batch, 1, {torch.float32}, modes=("none",))
    trained = load_recipe(SMALL_RECIPE, ALONE)
    other = describe_workload(trained, batch, 1, {torch.float32}, modes=("none",))
    locked, open_ = workload.measured[4].flops["image"], other.measured[4].flops["image"]
    assert locked.forward == open_.forward > 0
    assert locked.backward == 0 < open_.backward
    of_text = other.measured[4].flops["text"]
    assert workload.measured[4].flops["text"] == of_text
    with META:
        student = build_student(trained)
    image = sum(p.numel() for p in student.image.parameters())
    assert sum(workload.frozen) == image and sum(other.frozen) == 0
    # The average holds the towers and their projections; it has no FLOPs.
    assert workload.teacher == image + sum(
        p.numel()
        for part in (student.text, student.image_projection, student.text_projection)
        for p in part.parameters()
    )
    assert "teacher" not in workload.measured[4].flops
    assert other.teacher == 0
    trace = trace_step(recipe, batch)
    assert sum(trace.trained) == sum(map(sum, workload.groups))
