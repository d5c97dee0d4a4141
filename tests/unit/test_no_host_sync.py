"""On a GPU the mask, the towers, the losses and the EMA update never wait for the device.

The step runs on meta tensors, which have shapes but no values: whatever would read a value on the
host, make a shape from values or copy to the host fails. (Fake CUDA tensors would do it too, but
leave a process in which a fork cannot run a backward pass.)
"""

from dataclasses import replace

import pytest
import torch
from small_recipe import SMALL_RECIPE

from aclip.config.geometry import kept_blocks
from aclip.config.recipe import MaskConfig
from aclip.config.recipe_file import load_recipe
from aclip.method.losses.term import StudentOutput, Taught, TermContext, total
from aclip.method.masks.policies import POLICIES
from aclip.method.masks.policy import Selection, ViewsToMask, kept_patches
from aclip.method.tokens import END_ID, START_ID, Tokens, clip_tokens
from aclip.models.student import StudentInput, build_student
from aclip.training.teacher import Teacher

RECIPE = [
    "model.image.resolution=64",
    "model.image.kwargs={patch_size: 8, embed_dim: 24, depth: 3, num_heads: 2}",
    "model.text={width: 16, heads: 2, layers: 3, context_length: 16}",
    "model.embed_dim=12",
    "loss.simclr=1",
    "loss.byol=2",
    "loss.simclr_widths=[24, 24, 8]",
    "loss.byol_widths=[24, 8]",
    "teacher.resolution=64",
    "mask.block_size=2",
    "views.ssl=2",
    "loss.distill=0.05",
    "distill.num_codewords=32",
    "loss.mlm=0.05",
    "mlm.decoder_layers=1",
    "loss.words=1",
]
BATCH, GRID = 4, 8
TOKENS = clip_tokens(torch.tensor([[START_ID, *range(1, 15), END_ID]] * BATCH))
"""Tokens are on the CPU where masked language modelling chooses among them."""


def make(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device="meta")


@pytest.fixture(scope="module")
def recipe():
    return load_recipe(SMALL_RECIPE, RECIPE)


@pytest.fixture
def models(recipe):
    """The student and its teacher, with values."""
    student = build_student(recipe)
    return student, Teacher(student, torch.float32, torch.device("cpu"))


def _without_values(module, dtype):
    for part in module.modules():
        for name, weight in part.named_parameters(recurse=False):
            empty = make(*weight.shape, dtype=dtype)
            setattr(part, name, torch.nn.Parameter(empty, requires_grad=weight.requires_grad))


def _boxes():
    return {
        "teacher_box": make(BATCH, 4, dtype=torch.int32),
        "view_boxes": make(BATCH, 2, 4, dtype=torch.int32),
    }


@pytest.mark.parametrize(
    "wait",
    [
        pytest.param(lambda x: x.sum().item(), id="item"),
        pytest.param(lambda x: x[x > 0], id="boolean index"),
        pytest.param(lambda x: (x > 0).nonzero(), id="nonzero"),
        pytest.param(lambda x: 1 if (x > 0).any() else 0, id="branch"),
        pytest.param(lambda x: Tokens(x.long().view(1, 4), x[:1]).located(), id="located"),
        pytest.param(lambda x: x.cpu(), id="cpu"),
        pytest.param(lambda x: torch.zeros(4).copy_(x), id="copy"),
    ],
)
def test_what_waits_for_the_device_is_found(wait):
    with pytest.raises((RuntimeError, NotImplementedError), match="[mM]eta"):
        wait(make(4))


@pytest.mark.parametrize("noise", [{}, {"noise_share": 0.5}, {"temperature": 1.0}], ids=str)
@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "none"])
def test_mask_does_not_wait_for_the_device(policy, noise):
    views = ViewsToMask(
        GRID,
        5,
        2,
        pixels=make(BATCH, 2, 3, 64, 64),
        teacher_scores=make(BATCH, GRID, GRID),
        noise=make(BATCH, 2, GRID // 2, GRID // 2),
        keys=MaskConfig(),
        **_boxes(),
        **noise,
    )
    keep_ids = kept_patches(POLICIES[policy].select(views), GRID)
    assert keep_ids.shape == (BATCH, 2, 20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_step_does_not_wait_for_the_device(recipe, models, dtype):
    """Teacher, mask, towers, heads, losses, their gradients and the EMA update, on one rank."""
    student, teacher = models
    _without_values(student, dtype)
    _without_values(teacher.model, dtype)
    teacher._compute = dict(teacher.model.named_parameters())
    teacher._average = {name: make(*p.shape) for name, p in teacher._compute.items()}

    taught = teacher.forward(make(BATCH, 3, 64, 64, dtype=dtype))
    views = ViewsToMask(
        GRID, kept_blocks(recipe.mask, GRID, 1.0), 2, teacher_scores=taught.scores, **_boxes()
    )
    selection = POLICIES["attentive"].select(views)
    pixels = make(BATCH, 2, 3, 64, 64, dtype=dtype)
    tokens = TOKENS.map(lambda tensor: make(*tensor.shape, dtype=tensor.dtype))
    taught = Taught(taught.scores, taught.features, teacher.encode_patches(pixels[:, 0]))
    context = TermContext(
        pixels=pixels,
        tokens=TOKENS,
        noise=None,
        taught=taught,
        statistic=None,
        teacher=teacher.model,
        grid=GRID,
        patch_size=8,
        to_device=lambda tensor: make(*tensor.shape, dtype=tensor.dtype),
    )
    of_terms = {}
    for term in student.terms:
        shape = term.noise_shape(GRID)
        noise = None if shape is None else torch.zeros(BATCH, *shape)
        statistic = term.statistic([taught], [TOKENS], context.to_device)
        own = replace(context, noise=noise, statistic=statistic)
        of_terms[term.name] = term.inputs(own)
    inputs = StudentInput(pixels, selection, tokens, pixels, of_terms)
    output = StudentOutput.of(student("project", student("encode", inputs)))
    loss, _ = total(student.terms, output, teacher.targets(student.terms, [taught]))
    loss.backward()
    assert all(p.grad is not None for p in student.parameters() if p.requires_grad)
    teacher.update(student, 0.99)


def test_features_of_all_tokens_do_not_wait_for_the_device(models):
    student, _ = models
    _without_values(student, torch.float32)
    tokens = TOKENS.map(lambda tensor: make(*tensor.shape, dtype=tensor.dtype))
    masked = make(BATCH, 16, dtype=torch.bool)
    features = student.text.forward_tokens(tokens, masked, make(16))
    assert features.shape == (BATCH, 16, 16)

    selection = Selection(make(BATCH, 1, GRID, GRID), None, None, 5, 2)
    patches, keep_ids = student.image.forward_patches(make(BATCH, 3, 64, 64), selection)
    assert patches.shape == (BATCH, 21, 24) and keep_ids.shape == (BATCH, 20)
