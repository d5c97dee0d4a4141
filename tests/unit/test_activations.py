"""What a step keeps for its backward pass: by hand, and against autograd's own on a CPU."""

import pytest
import torch
from small_recipe import SMALL_RECIPE
from torch.autograd.graph import saved_tensors_hooks

from aclip.config.recipe_file import load_recipe
from aclip.data.synthetic import batch_of_mean_captions
from aclip.models.student import build_student
from aclip.planning.measure_step import measure_step
from aclip.training.step_inputs import StepInputs
from aclip.training.teacher import Teacher

CAPTION, LONGEST = 17, 29  # tokens: the mean, and that to which captions are padded
CPU = torch.device("cpu")


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


# Small towers: 64 patches of 8 px.
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
    recipe = load_recipe(SMALL_RECIPE, [*overrides, *modes])
    batch = batch_of_mean_captions(recipe, CAPTION, LONGEST)
    step = measure_step(recipe, batch, dtype=dtype, modes=())

    student = build_student(recipe).to(dtype)
    teacher = Teacher(student, dtype, CPU) if recipe.needs_teacher else None
    inputs = StepInputs(recipe, student.terms, teacher, student.image, CPU, dtype)
    taught = inputs.teach(batch)
    statistics = inputs.statistics([batch], [taught])
    student_input = inputs.student(batch, taught, statistics)
    kept, features = kept_bytes(student, lambda: student.encode(student_input))
    assert len(batch) * step.encoding[None].kept == pytest.approx(kept, rel=0.02)

    assert recipe.train.global_batch_size == len(batch)
    leaves = {name: part.detach().requires_grad_() for name, part in features.items()}
    kept, output = kept_bytes(student, lambda: student.project(leaves))
    embeds = sum(part.nbytes for part in output.values() if len(part) > 1)
    # What the losses read is there as well, whatever they keep of it.
    assert step.heads == pytest.approx(kept + embeds, rel=0.02)


TOKENS, WIDTH, HEADS, VIEWS = 1 + 32, 96, 3, 2  # half of 64 patches
# A token: 8 tensors of the width and 2 of the MLP's: input, norm, query, key, value, attention's
# output, second input, second norm; the MLP before and behind its activation.
ROW = 8 * WIDTH + 2 * 4 * WIDTH
NORMS_AND_ACTIVATION = 2 * WIDTH + 4 * WIDTH
STATISTICS = (HEADS + 2 * 2) * 4  # fp32: the heads' log-sums, both norms' mean and deviation


def encoding(depth, dtype=torch.float32):
    kwargs = f"{{patch_size: 8, embed_dim: {WIDTH}, depth: {depth}, num_heads: {HEADS}}}"
    recipe = load_recipe(SMALL_RECIPE, [f"model.image.kwargs={kwargs}"])
    return measure_step(recipe, batch_of_mean_captions(recipe, CAPTION, 32), dtype=dtype).encoding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_activations_of_a_block_by_hand(dtype):
    shallow, deep, width = encoding(3, dtype), encoding(4, dtype), dtype.itemsize
    one_more = {mode: deep[mode].kept - shallow[mode].kept for mode in deep}
    whole = TOKENS * (ROW * width + STATISTICS)
    assert one_more["none"] == VIEWS * whole
    assert one_more["elementwise"] == VIEWS * (whole - TOKENS * NORMS_AND_ACTIVATION * width)
    assert one_more["blocks"] == VIEWS * TOKENS * WIDTH * width
    assert one_more[None] == one_more["none"]


def test_recomputed_blocks_are_held_one_at_a_time():
    step = encoding(4)
    # The text tower's pass is over, and of the image tower's three blocks are left: their inputs,
    # and what the last of them has besides. The patch embedding keeps its own input.
    whole = TOKENS * (ROW * 4 + STATISTICS)
    patches = 64 * (3 * 8 * 8) * 4 + 64 * 4  # with where each patch went, int32
    expected = VIEWS * (2 * TOKENS * WIDTH * 4 + whole + patches)
    assert step["blocks"].kept == pytest.approx(expected, rel=0.02)


def plain_clip(num_ranks, local_size, views):
    overrides = ["mask.policy=none", "teacher=null", f"views.student={views}"]
    overrides.append(f"train.global_batch_size={num_ranks * local_size}")
    recipe = load_recipe(SMALL_RECIPE, overrides)
    return measure_step(recipe, batch_of_mean_captions(recipe, CAPTION, 32), num_ranks, modes=())


@pytest.mark.parametrize("views", [1, 2])
def test_losses_grow_with_the_global_batch(views):
    local, embed = 8, 96
    few, many = plain_clip(2, local, views), plain_clip(4, local, views)
    # A column more: its gathered embeddings, their gradients in each direction of each view, and
    # the local batch's logits, fp32.
    column = (views + 1) * embed + 2 * views * embed + local
    assert many.losses - few.losses == 4 * 2 * local * column
    assert many.heads == few.heads


def test_collectives_of_the_losses():
    local, embed = 8, 96
    # Embeddings of two views and a text are gathered, and their gradients all-reduced: fp32.
    assert plain_clip(4, local, 2).collectives == 3 * 4 * (4 * local) * 3 * embed
    assert plain_clip(1, local, 2).collectives == 0
