"""On a GPU the mask, the towers, the losses and the EMA update never wait for the device.

The step runs on fake tensors, which have shapes but no values: whatever would read a value on the
host, or make a shape from values, fails. On a fake CUDA device so does any copy to the host; the
backward pass needs a real device, so it runs on fake CPU tensors.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from aclip import losses, masking
from aclip.config import load_recipe
from aclip.losses import StudentOutput
from aclip.models.student import (
    DistillInput,
    MlmInput,
    StudentInput,
    build_student,
    kept_blocks,
)
from aclip.models.text import real_token_ids
from aclip.teacher import Teacher

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
]
BATCH, GRID = 4, 8


class CopyToHost(Exception):
    pass


class RefuseCopies(TorchDispatchMode):
    """Raises where an op reads CUDA tensors and gives one on the CPU."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if any(_devices(args, kwargs)) and not all(_devices(result)):
            raise CopyToHost(str(function))
        return result


def _devices(*trees):
    """Whether each tensor is on CUDA."""
    return [leaf.is_cuda for leaf in tree_leaves(trees) if isinstance(leaf, torch.Tensor)]


@pytest.fixture(scope="module")
def recipe():
    return load_recipe("demo", RECIPE)


@pytest.fixture
def models(recipe):
    """The student and its teacher, with values."""
    student = build_student(recipe)
    return student, Teacher(student, torch.float32, torch.device("cpu"))


@pytest.fixture(params=["cuda", "cpu"])
def make(request):
    """Fake tensors until the test ends, and `make(*shape, dtype)` that gives one on the device."""

    def fake(*shape, dtype=torch.float32):
        return torch.zeros(*shape, dtype=dtype, device=request.param)

    with FakeTensorMode(), RefuseCopies():
        yield fake


def _without_values(module, make, dtype):
    for part in module.modules():
        for name, weight in part.named_parameters(recurse=False):
            fake = make(*weight.shape, dtype=dtype)
            setattr(part, name, torch.nn.Parameter(fake, requires_grad=weight.requires_grad))


def _boxes(make):
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
        pytest.param(lambda x: real_token_ids(x.long().view(1, 4)), id="real_token_ids"),
    ],
)
def test_reading_a_value_is_found(make, wait):
    with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
        wait(make(4))


@pytest.mark.parametrize("make", ["cuda"], indirect=True)
@pytest.mark.parametrize("copy", [lambda x: x.cpu(), lambda x: torch.zeros(4).copy_(x)])
def test_copy_to_the_host_is_found(make, copy):
    with pytest.raises(CopyToHost):
        copy(make(4))


@pytest.mark.parametrize("policy", ["random", "attentive", "inverse"])
def test_mask_does_not_wait_for_the_device(make, policy):
    selection = masking.select(
        policy,
        5,
        2,
        teacher_scores=make(BATCH, GRID, GRID),
        noise=make(BATCH, 2, GRID // 2, GRID // 2),
        **_boxes(make),
    )
    keep_ids = masking.kept_patches(selection, GRID, BATCH, 2)
    assert keep_ids.shape == (BATCH, 2, 20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_step_does_not_wait_for_the_device(recipe, models, make, dtype):
    """Teacher, mask, towers, heads, losses, their gradients and the EMA update, on one rank."""
    student, teacher = models
    _without_values(student, make, dtype)
    _without_values(teacher.model, make, dtype)
    teacher._compute = dict(teacher.model.named_parameters())
    teacher._average = {name: make(*p.shape) for name, p in teacher._compute.items()}

    taught = teacher.forward(make(BATCH, 3, 64, 64, dtype=dtype))
    selection = masking.select(
        "attentive", kept_blocks(recipe, GRID), 2, teacher_scores=taught.scores, **_boxes(make)
    )
    pixels = make(BATCH, 2, 3, 64, 64, dtype=dtype)
    tokens, real_ids = make(BATCH, 16, dtype=torch.int64), make(37, dtype=torch.int64)
    random = masking.select("random", 16, 1, noise=make(BATCH, 1, GRID, GRID))
    masked_ids = masking.other_patches(masking.kept_patches(random, GRID, BATCH, 1)[:, 0], 64)
    patches = teacher.encode_patches(pixels[:, 0])
    codewords = teacher.codeword_probabilities(patches[:, :48], make(24), 0.04)
    distill = DistillInput(random, masked_ids, codewords)
    ids = make(5, dtype=torch.int64)
    masked = make(BATCH, 16, dtype=torch.bool)
    mlm = MlmInput(masked, ids, ids, ids, make(5))
    inputs = StudentInput(pixels, selection, tokens, real_ids, pixels, distill, mlm)
    output = StudentOutput(**student("project", student("encode", inputs)))
    target = teacher.project(taught.features)
    loss, _ = losses.total(output, target, recipe.loss.model_dump(), 0.1)
    if not loss.is_cuda:
        loss.backward()
        assert all(p.grad is not None for p in student.parameters() if p.requires_grad)
    teacher.update(student, 0.99)


def test_features_of_all_tokens_do_not_wait_for_the_device(models, make):
    student, _ = models
    _without_values(student, make, torch.float32)
    tokens, real_ids = make(BATCH, 16, dtype=torch.int64), make(37, dtype=torch.int64)
    masked = make(BATCH, 16, dtype=torch.bool)
    features = student.text.forward_tokens(tokens, masked, make(16), real_ids)
    assert features.shape == (BATCH, 16, 16)

    selection = masking.Selection(make(BATCH, 1, GRID, GRID), None, None, 5, 2)
    patches, keep_ids = student.image.forward_patches(make(BATCH, 3, 64, 64), selection)
    assert patches.shape == (BATCH, 21, 24) and keep_ids.shape == (BATCH, 20)
