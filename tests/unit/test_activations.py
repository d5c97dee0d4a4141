"""What a step keeps for its backward pass, against autograd's own and by hand."""

import dataclasses

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from aclip.config.geometry import kept_blocks
from aclip.config.recipe_file import load_recipe
from aclip.method.masking import Selection
from aclip.method.tokens import END_ID, START_ID
from aclip.models.student import (
    DistillInput,
    MlmInput,
    StudentInput,
    build_student,
)
from aclip.planning.activation_memory import (
    activations,
    local_activations,
    logits,
    tower_activations,
)
from aclip.planning.step_shape import BlockShape, StepShape, TowerPass, describe_step

BATCH = 8
SHORTEST, CAPTION, LONGEST = 5, 17, 29  # tokens: of every other caption, the mean, of the others
MASKED = 3  # 20 % of the mean caption's 15 pieces


@pytest.fixture
def kept_bytes(monkeypatch):
    """kept_bytes(module, run): bytes that autograd keeps of run(), parameters left out; its result.

    Hooks inside of hooks hide from these what they keep, so those of recompute report it here.
    """
    kept = {}

    def keep(tensor):
        if isinstance(tensor, torch.Tensor):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage  # held, so that no address comes twice
        return tensor

    def reporting_hooks(pack, unpack):
        return saved_tensors_hooks(lambda tensor: keep(pack(tensor)), unpack)

    monkeypatch.setattr("aclip.models.recompute.saved_tensors_hooks", reporting_hooks)

    def measure(module, run):
        kept.clear()
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            result = run()
        for parameter in module.parameters():
            kept.pop(parameter.untyped_storage().data_ptr(), None)
        return sum(storage.nbytes() for storage in kept.values()), result

    return measure


def make_input(recipe, student, dtype):
    grid, side, num_views = student.image.grid, recipe.model.image.resolution, recipe.views.student
    selection = ssl = distill = mlm = None
    if recipe.mask.policy != "none":
        scores = torch.rand(BATCH, num_views, grid, grid)
        size = recipe.mask.block_size
        selection = Selection(scores, None, None, kept_blocks(recipe, grid), size)
    tokens = torch.full((BATCH, LONGEST), START_ID)
    tokens[::2, SHORTEST - 1] = tokens[1::2, -1] = END_ID
    is_real = torch.arange(LONGEST) <= tokens.argmax(1, keepdim=True)
    if recipe.views.ssl:
        ssl = torch.randn(BATCH, 2, 3, side, side, dtype=dtype)
    if recipe.loss.distill:
        num_masked = int(recipe.distill.mask_ratio * grid**2)
        scores = torch.rand(BATCH, 1, grid, grid)
        distill = DistillInput(
            Selection(scores, None, None, grid**2 - num_masked, 1),
            torch.zeros(BATCH, num_masked, dtype=torch.int64),
            torch.rand(BATCH, num_masked, recipe.distill.num_codewords),
        )
    if recipe.loss.mlm:
        ids = torch.zeros(BATCH * MASKED, dtype=torch.int64)
        mlm = MlmInput(torch.zeros_like(is_real), ids, ids, ids, torch.ones(BATCH * MASKED))
    pixels = torch.randn(BATCH, num_views, 3, side, side, dtype=dtype)
    real_ids = is_real.flatten().nonzero().squeeze(1)
    return StudentInput(pixels, selection, tokens, real_ids, ssl, distill, mlm)


# Small towers of the demo: 64 patches of 8 px.
STEPS = [
    pytest.param(["loss.simclr=1", "loss.byol=2"], id="A-CLIP"),
    pytest.param(
        ["mask.policy=none", "teacher=null", "views={student: 1, ssl: 2}", "loss.simclr=1"],
        id="SLIP",
    ),
    pytest.param(
        ["loss.distill=1", "loss.mlm=1", "distill.num_codewords=64", "views.student=1"],
        id="MaskCLIP",
    ),
    pytest.param(
        ["model.image.freeze_patch_embed=true", "model.text.layers=4"], id="frozen embedding"
    ),
]


@pytest.mark.parametrize("mode", ["none", "elementwise"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("overrides", STEPS)
def test_activations_are_what_autograd_keeps(kept_bytes, overrides, dtype, mode):
    modes = [f"model.image.recompute={mode}", f"model.text.recompute={mode}"]
    recipe = load_recipe("demo", [*overrides, *modes])
    student = build_student(recipe).to(dtype)
    step = describe_step(recipe, student, CAPTION, LONGEST)
    inputs = make_input(recipe, student, dtype)
    kept, features = kept_bytes(student, lambda: student.encode(inputs))
    assert BATCH * activations(step, dtype.itemsize) == pytest.approx(kept, rel=0.1)

    leaves = {name: part.detach().requires_grad_() for name, part in features.items()}
    kept, _ = kept_bytes(student, lambda: student.project(leaves))
    assert BATCH * local_activations(step, dtype.itemsize) == pytest.approx(kept, rel=0.1)


@pytest.mark.parametrize("mode", ["none", "elementwise"])
def test_text_activations_are_what_autograd_keeps(kept_bytes, mode):
    recipe = load_recipe("demo", ["model.text.layers=4", f"model.text.recompute={mode}"])
    student = build_student(recipe)
    step = describe_step(recipe, student, CAPTION, LONGEST)
    inputs = make_input(recipe, student, torch.float32)
    (shape,) = (tower for tower in step.towers if tower.name == "text tower")
    kept, _ = kept_bytes(student, lambda: student.text(inputs.tokens, inputs.real_ids))
    assert BATCH * tower_activations(shape, 4) == pytest.approx(kept, rel=0.1)


def test_activations_of_a_block_by_hand():
    block = BlockShape(width=10, mlp_width=40, num_heads=2)
    tower = TowerPass("t", block, 3, num_tokens=5, num_runs=2)
    # A token: 8 tensors of the width and 2 of the MLP's, 2 bytes each; 2 heads' log-sum and two
    # norms' two statistics, fp32. Behind the last block one more norm's input.
    whole = 5 * (8 * 10 + 2 * 40) * 2 + 5 * 2 * 4 + 5 * 2 * 2 * 4
    assert tower_activations(tower, 2) == 2 * (3 * whole + 5 * 10 * 2)
    # Recomputed: the input of each block, and all of one block.
    blocks = dataclasses.replace(tower, recompute="blocks")
    assert tower_activations(blocks, 2) == 2 * (3 * 100 + whole + 100)
    # Without both norms and the MLP behind its activation.
    elementwise = dataclasses.replace(tower, recompute="elementwise")
    less = 5 * (2 * 10 + 40) * 2
    assert tower_activations(elementwise, 2) == 2 * (3 * (whole - less) + 100)
    assert tower_activations(dataclasses.replace(tower, trained=False), 2) == 0


STEP = StepShape((), (), 2, 3, None, global_batch_size=8)


def test_logits_by_hand():
    # 3 x (2 x 4 + 8) embeddings of 3; 4 directions' gradients of 4 rows and 8 columns; 2 x 8 logits
    assert logits(STEP, 4, chunk_rows=2) == 4 * (3 * 16 * 3 + 4 * 12 * 3 + 2 * 8)
    simclr = dataclasses.replace(STEP, simclr_dim=6)
    more = logits(simclr, 4, chunk_rows=2) - logits(STEP, 4, chunk_rows=2)
    assert more == 4 * (2 * 16 * 6 + 4 * 2 * 4 * 8)
