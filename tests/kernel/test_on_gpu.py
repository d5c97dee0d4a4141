"""The compiled kernels at a real tower's shapes; the other files' tests run on a GPU as well."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from aclip.config.ds_config import read_ds_config
from aclip.config.recipe_file import load_recipe
from aclip.data.batch import join
from aclip.data.synthetic import synthetic_batch
from aclip.distributed import default_to_one_rank
from aclip.engine.process_group import init_distributed
from aclip.kernels.attentive_pack import attentive_pack, attentive_pack_reference
from aclip.kernels.augment_views import augment_views, augment_views_reference
from aclip.kernels.cls_attention_scores import (
    cls_attention_scores,
    cls_attention_scores_reference,
)
from aclip.kernels.cluster_counts import anchor_similarity, cluster_counts
from aclip.kernels.contrastive_loss import contrastive_loss, contrastive_loss_reference
from aclip.kernels.cut_views import cut_views, cut_views_reference
from aclip.kernels.sigmoid_loss import sigmoid_loss, sigmoid_loss_reference
from aclip.training.step_watch import StepWatch
from aclip.training.stepper import Stepper

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_attentive_pack_equals_its_reference_at_vit_b_16():
    def draw(*shape):
        return torch.randn(*shape, device="cuda").bfloat16().requires_grad_()

    inputs = draw(128, 196, 768), draw(768), draw(197, 768)
    scores = torch.rand(64, 1, 14, 14, device="cuda")
    teacher_box = torch.tensor([[10, 20, 400, 380]] * 64, dtype=torch.int32, device="cuda")
    views = [[30, 40, 300, 280], [60, 50, 320, 340]]
    view_boxes = torch.tensor([views] * 64, dtype=torch.int32, device="cuda")
    arguments = (*inputs, scores, teacher_box, view_boxes, 25, 2)
    packed, keep_ids = attentive_pack(*arguments)
    expected, expected_ids = attentive_pack_reference(*arguments)
    same = (keep_ids == expected_ids).flatten(0, 1).all(1)
    assert same.float().mean() > 0.98  # a near tie may fall the other way
    torch.testing.assert_close(packed[same], expected[same])
    weight = torch.randn_like(packed) * same[:, None, None]
    for actual, wanted in zip(
        torch.autograd.grad(packed, inputs, weight),
        torch.autograd.grad(expected, inputs, weight),
        strict=True,
    ):
        torch.testing.assert_close(actual, wanted, rtol=2**-7, atol=2**-4)


def test_cls_attention_scores_equal_their_reference_at_vit_b_16():
    qkv = torch.randn(64, 197, 3, 12, 64, device="cuda").bfloat16()
    actual, expected = torch.zeros(64, 196, device="cuda"), torch.zeros(64, 196, device="cuda")
    cls_attention_scores(qkv[:, 0, 0], qkv[:, :, 1], actual, 1 / 12)
    cls_attention_scores_reference(qkv[:, 0, 0], qkv[:, :, 1], expected, 1 / 12)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-7)


def test_cluster_counts_equal_their_reference_at_224_pixels():
    smooth = torch.randn(64, 3, 28, 28, device="cuda")
    views = torch.nn.functional.interpolate(smooth, size=224, mode="bilinear").bfloat16()
    anchors = torch.rand(64, 196, device="cuda").argsort(1)[:, :6].contiguous()
    similarity = anchor_similarity(views, anchors, 16)
    expected = (similarity > 0.3).sum(1)
    near = ((similarity - 0.3).abs() < 1e-5).any(1)  # rounding may decide there
    assert near.float().mean() < 0.01 and expected.amax() > 1
    counts = cluster_counts(views, anchors, 16, 0.3)
    assert torch.equal(counts[~near].long(), expected[~near])


def test_augmented_views_equal_their_reference_at_224_pixels():
    views = torch.randint(0, 256, (48, 3, 224, 224), dtype=torch.uint8, device="cuda")
    index = torch.arange(48, device="cuda")
    params = torch.rand(48, 9, device="cuda") + 0.5
    params[:, 4] -= 1
    params[:, 5] = index % 24
    for column, period in ((0, 5), (6, 4), (7, 3), (8, 7)):
        params[:, column] *= index % period == 1
    statistics = torch.full((3,), 0.4, device="cuda"), torch.full((3,), 0.3, device="cuda")
    actual = augment_views(views, params, *statistics, torch.float32)
    expected = augment_views_reference(views, params, *statistics, torch.float32)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


def test_cut_views_equal_their_reference_at_224_pixels():
    height, width, count = 375, 500, 48
    pixels = torch.randint(0, 256, (count * height * width, 3), dtype=torch.uint8, device="cuda")
    first = height * width * torch.arange(count)
    places = torch.stack([torch.full_like(first, size) for size in (height, width, 1)] + [first], 1)
    boxes = torch.tensor([[[0, 0, 375, 500], [30, 41, 301, 280], [200, 300, 90, 77]]] * count)
    flips = torch.rand(count, 3) < 0.5
    arguments = (pixels, places.cuda(), boxes.cuda(), flips.cuda(), 224)
    apart = (cut_views(*arguments).int() - cut_views_reference(*arguments).int()).abs()
    assert apart.max() <= 1
    assert apart.float().mean() < 1e-3


def rank_of_eight():
    """A rank's rows, all ranks' columns and a scale, as losses over the global batch read them."""
    rows, columns = torch.randn(512, 512, device="cuda"), torch.randn(4096, 512, device="cuda")
    rows = torch.nn.functional.normalize(rows, dim=1).requires_grad_()
    columns = torch.nn.functional.normalize(columns, dim=1).requires_grad_()
    return rows, columns, torch.full((1,), 60.0, device="cuda", requires_grad=True)


@pytest.mark.parametrize(
    "op, reference, numbers",
    [
        pytest.param(contrastive_loss, contrastive_loss_reference, (), id="contrastive"),
        pytest.param(sigmoid_loss, sigmoid_loss_reference, (-10.0,), id="sigmoid"),
    ],
)
def test_losses_equal_their_references_for_a_rank_of_eight(op, reference, numbers):
    more = [torch.full((1,), number, device="cuda", requires_grad=True) for number in numbers]
    inputs = (*rank_of_eight(), *more)
    loss = op(*inputs, 1024, 200)
    actual = loss, *torch.autograd.grad(loss, inputs)
    expected = reference(*(part.detach() for part in inputs), 1024, 200, True, True)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def one_rank():
    """This rank's device. All tests share the process group, since DeepSpeed keeps groups that it
    has made from one (0.19.8)."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            patch.delenv(name, raising=False)
        default_to_one_rank()
        yield init_distributed()
        dist.destroy_process_group()


@pytest.mark.parametrize("stage", [1, 2])
def test_a_step_never_waits_for_the_device(one_rank, stage):
    recipe = load_recipe("aclip_vits16", ["train.global_batch_size=32"])
    ds_config = read_ds_config(str(ROOT / f"ds_configs/zero{stage}.json"), 32, 1)
    stepper = Stepper(recipe, ds_config, one_rank)
    batch = join([synthetic_batch(recipe, 32)], pin=True)
    watch = StepWatch()
    for step in range(4):
        if step == 3:
            torch.cuda.set_sync_debug_mode("error")
        try:
            terms = stepper.step(batch, 1e-3, 0.99)
            terms = {**terms, "gradient_norm": stepper.gradient_norm()}
            watch.settle()  # waits for an event, which is no synchronisation of the device
            watch.put(step, terms, batch.keys, [0, 0])
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(value > 0 for value in watch.settle().terms.values())
