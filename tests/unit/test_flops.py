"""The analytic FLOPs equal those that torch counts in a real step, at real widths and depths.

The counted step runs on the meta device: every operation is dispatched with its real shapes, none
is computed. Not counted by torch, because they are elementwise in the reference: the remap of
attentive_pack and cls_attention_scores. The products inside contrastive_loss are, by a formula.
"""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from aclip.config.geometry import kept_blocks
from aclip.config.recipe_file import load_recipe, recipe_names
from aclip.method import losses
from aclip.method.masking import Selection
from aclip.method.tokens import END_ID, START_ID
from aclip.models.student import (
    DistillInput,
    MlmInput,
    StudentInput,
    build_student,
)
from aclip.planning import flops
from aclip.planning.step_shape import (
    BlockShape,
    HeadShape,
    PatchEmbedShape,
    StepShape,
    TowerPass,
    describe_step,
)
from aclip.training.teacher import Teacher

BATCH = 2
SHORTEST, CAPTION, LONGEST = 5, 17, 29  # tokens: of the first caption, the mean, the second
MASKED = 3  # 20 % of the mean caption's 15 pieces


def contrastive_products(rows, columns, scale, offset, chunk, grad_rows, grad_columns, out_shape):
    """FLOPs of the op from its arguments' shapes: the logits and the gradients asked for."""
    return 2 * rows[0] * columns[0] * rows[1] * (1 + grad_rows + grad_columns)


def count_step(recipe, student, device):
    """Forward and backward FLOPs of one step on BATCH samples, as torch counts them."""
    with torch.device(device):
        teacher = None
        if recipe.needs_teacher:
            teacher = Teacher(student, torch.float32, torch.device(device))
        inputs, teacher_view = make_inputs(recipe, student)
        custom = {torch.ops.aclip.contrastive_loss: contrastive_products}
        with sdpa_kernel(SDPBackend.MATH):
            with FlopCounterMode(display=False, custom_mapping=custom) as forward:
                taught = teach(recipe, student, teacher, inputs, teacher_view)
                output = losses.StudentOutput(**student.project(student.encode(inputs)))
                loss, _ = losses.total(output, taught, recipe.loss.model_dump(), 0.1)
            with FlopCounterMode(display=False) as backward:
                loss.backward()
    return forward.get_total_flops(), backward.get_total_flops()


def make_inputs(recipe, student):
    grid, side = student.image.grid, recipe.model.image.resolution
    num_views = recipe.views.student
    selection = None
    if recipe.mask.policy != "none":
        scores = torch.rand(BATCH, num_views, grid, grid)
        size = recipe.mask.block_size
        selection = Selection(scores, None, None, kept_blocks(recipe, grid), size)
    tokens = torch.full((BATCH, LONGEST), START_ID)
    tokens[0, SHORTEST - 1] = tokens[1, -1] = END_ID
    ssl_pixels = torch.randn(BATCH, 2, 3, side, side) if recipe.views.ssl else None
    distill = mlm = None
    if recipe.loss.distill:
        num_masked = int(recipe.distill.mask_ratio * grid**2)
        codewords = recipe.distill.targets == "codewords"
        num_targets = recipe.distill.num_codewords if codewords else student.image.width
        scores = torch.rand(BATCH, 1, grid, grid)
        distill = DistillInput(
            Selection(scores, None, None, grid**2 - num_masked, 1),
            torch.zeros(BATCH, num_masked, dtype=torch.int64),
            torch.rand(BATCH, num_masked, num_targets),
        )
    if recipe.loss.mlm:
        ids = torch.zeros(BATCH * MASKED, dtype=torch.int64)
        masked = torch.zeros(BATCH, LONGEST, dtype=torch.bool)
        mlm = MlmInput(masked, ids, ids, ids, torch.ones(BATCH * MASKED))
    pixels = torch.randn(BATCH, num_views, 3, side, side)
    real_ids = torch.cat([torch.arange(SHORTEST), torch.arange(LONGEST) + LONGEST])
    teacher_view = None
    if recipe.needs_teacher_view:
        teacher_view = torch.randn(BATCH, 3, recipe.teacher.resolution, recipe.teacher.resolution)
    return StudentInput(pixels, selection, tokens, real_ids, ssl_pixels, distill, mlm), teacher_view


def teach(recipe, student, teacher, inputs, teacher_view):
    """All that the teacher computes; returns BYOL's target."""
    target = None
    if recipe.needs_teacher_view:
        taught = teacher.forward(teacher_view)
        target = teacher.project(taught.features) if recipe.loss.byol else None
    if recipe.distills_features:
        patches = teacher.encode_patches(inputs.pixels[:, 0])
        masked = patches[:, : inputs.distill.masked_ids.shape[1]]
        if recipe.distill.targets == "codewords":
            teacher.codeword_probabilities(masked, torch.zeros(student.image.width), 0.04)
    return target


@pytest.mark.parametrize("name", recipe_names())
def test_step_equals_what_torch_counts(name):
    compare(load_recipe(name, [f"train.global_batch_size={BATCH}"]), "meta")


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(["loss.simclr=1", "loss.byol=2"], id="A-CLIP"),
        pytest.param(["loss.distill=1", "distill.targets=features"], id="features as targets"),
        pytest.param(["model.image.freeze_patch_embed=true"], id="frozen patch embedding"),
    ],
)
def test_computed_step_equals_what_torch_counts(overrides):
    recipe = load_recipe("demo", [f"train.global_batch_size={BATCH}", *overrides])
    compare(recipe, "cpu")


def compare(recipe, device):
    with torch.device(device):
        student = build_student(recipe)
    parts = flops.step_flops(describe_step(recipe, student, CAPTION, LONGEST))
    total = sum(parts.values(), flops.Flops())
    forward, backward = count_step(recipe, student, device)
    assert BATCH * total.forward == pytest.approx(forward, rel=0.03)
    assert BATCH * total.backward == pytest.approx(backward, rel=0.03)


BLOCK = BlockShape(width=4, mlp_width=8, num_heads=2)


def test_block_over_all_tokens():
    # 3 tokens: qkv 2*3*4*12, scores and sum 2*3*3*4 each, projection 2*3*4*4, MLP 2*3*4*8 twice
    forward = 288 + 2 * 72 + 96 + 2 * 192
    counted = flops.transformer_block(3, 3, BLOCK)
    assert (counted.forward, counted.backward) == (forward, 2 * forward)


def test_padding_costs_in_attention_alone():
    longer = (
        flops.transformer_block(3, 5, BLOCK).forward - flops.transformer_block(3, 3, BLOCK).forward
    )
    assert longer == 2 * 2 * (25 - 9) * 4


def test_block_of_one_query():
    # query, lifted query, value: 3 * 2*4*4; scores and sum over 5 tokens: 2 * 2*(2 heads)*4*5;
    # projection 2*4*4, MLP 2 * 2*4*8
    assert flops.one_query_block(5, BLOCK).forward == 96 + 160 + 32 + 128


@pytest.mark.parametrize("trained, backward", [(False, 0), (True, 2 * 9 * 12 * 4)])
def test_patch_embedding_has_at_most_a_weight_gradient(trained, backward):
    embed = PatchEmbedShape(num_patches=9, num_inputs=12, trained=trained)
    tower = TowerPass("image", BLOCK, 1, num_tokens=4, num_runs=2, embed=embed)
    counted = flops.patch_embedding(tower)
    assert (counted.forward, counted.backward) == (2 * 2 * 9 * 12 * 4, 2 * backward)


def test_head_and_logits():
    assert flops.head(HeadShape("h", (4, 6, 5), 3)).forward == 2 * 3 * (4 * 6 + 6 * 5)
    assert flops.head(HeadShape("h", (4, 6), 3, trained=False)).backward == 0
    # 2 views x 2 directions x (logits, two gradients), each 2 * 10 columns * 7
    assert flops.contrastive_logits(10, 7, 2).total == 2 * 2 * 3 * 140
    # each of 2 views against 2 views, forward and two gradients
    assert flops.simclr_logits(10, 7).total == 2 * 2 * 3 * 140


def test_what_runs_twice_is_counted_apart():
    block_forward = flops.transformer_block(3, 3, BLOCK).forward
    tower = TowerPass("image", BLOCK, 2, num_tokens=3, recompute="blocks")
    teacher = TowerPass("teacher", BLOCK, 2, num_tokens=3, trained=False)
    step = StepShape((tower, teacher), (), 1, 4, None, 8)
    # recomputed once, and 3 of 4 micro_steps run the tower's forward pass twice
    assert flops.repeated_flops(step, 4) == 2 * block_forward * (1 + 3 / 4)
