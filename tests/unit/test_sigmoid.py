"""SigLIP's loss as a term: its value, its bias, and where the bias goes."""

import argparse

import open_clip
import pytest
import torch
import torch.nn.functional as F
from small_recipe import SMALL_RECIPE

from aclip.config.recipe_file import load_recipe
from aclip.errors import ConfigError
from aclip.evaluation.load_model import load_model
from aclip.method.losses.sigmoid import sigmoid
from aclip.models.student import build_student
from aclip.weights.export import export

SIGLIP = ["loss.contrastive=0", "loss.sigmoid=1", "loss.initial_logit_scale=10"]


def slow_sigmoid(images, texts, scale, bias):
    """One pair at a time."""
    batch, num_views = images.shape[:2]
    total = 0
    for i in range(batch):
        for view in range(num_views):
            for j in range(batch):
                cosine = F.cosine_similarity(images[i, view], texts[j], dim=0)
                logit = scale * cosine + bias
                total = total + torch.log1p(torch.exp(-logit if i == j else logit))
    return total / (batch * num_views)


@pytest.mark.parametrize("num_views", [1, 2])
def test_loss_and_gradients_equal_float64_loops(num_views):
    torch.manual_seed(0)
    inputs = (
        torch.randn(5, num_views, 6),
        torch.randn(5, 6),
        torch.tensor([9.0]),
        torch.tensor([-8.0]),
    )
    ours = [tensor.clone().requires_grad_() for tensor in inputs]
    exact = [tensor.double().requires_grad_() for tensor in inputs]
    loss, expected = sigmoid(*ours), slow_sigmoid(*exact).squeeze()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    gradients = torch.autograd.grad(loss, ours)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, exact), strict=True):
        assert (ours.double() - theirs).abs().max() <= 1e-5 * theirs.abs().max() > 0


def test_loss_in_uneven_chunks_equals_the_whole(monkeypatch):
    torch.manual_seed(1)
    images, texts = torch.randn(7, 2, 5), torch.randn(7, 5)
    scale, bias = torch.tensor([10.0]), torch.tensor([-10.0])
    expected = slow_sigmoid(images.double(), texts.double(), 10.0, -10.0)
    monkeypatch.setattr("aclip.method.losses.sigmoid.CHUNK_ROWS", 3)
    assert sigmoid(images, texts, scale, bias).item() == pytest.approx(expected.item(), rel=1e-6)


def test_the_student_learns_a_bias_that_belongs_to_the_model():
    for for_training in (True, False):
        student = build_student(load_recipe(SMALL_RECIPE, SIGLIP), for_training)
        assert student.model_parameters()["logit_bias.logit_bias"].item() == -10
        assert student.logit_scale().item() == pytest.approx(10)
    assert not hasattr(build_student(load_recipe(SMALL_RECIPE)), "logit_bias")


def test_two_losses_that_would_share_a_scale_are_refused():
    with pytest.raises(ConfigError, match="loss.sigmoid is 1 with loss.contrastive 1"):
        load_recipe(SMALL_RECIPE, ["loss.sigmoid=1"])
    with pytest.raises(ConfigError, match="loss.contrastive is 0 and loss.sigmoid is 0"):
        load_recipe(SMALL_RECIPE, ["loss.contrastive=0"])


@torch.no_grad()
def test_open_clip_gets_the_bias_and_gives_the_same_logits(write_run, tmp_path):
    run, student, _ = write_run(load_recipe(SMALL_RECIPE, SIGLIP))
    arguments = {"checkpoint": str(run), "out": str(tmp_path / "out"), "model": "student"}
    export(argparse.Namespace(**arguments, format="open_clip"))
    theirs = open_clip.create_model(f"local-dir:{tmp_path / 'out'}").eval()
    assert theirs.logit_bias.item() == student.logit_bias().item()
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    captions = ["a red ring", "two green stars"]
    tokens = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'out'}")(captions)
    features = theirs(pixels, tokens)
    images = F.normalize(student.encode_image(pixels), dim=1)
    logits = student.logit_scale() * images @ features[1].T + student.logit_bias()
    theirs_logits, _ = theirs.get_logits(pixels, tokens)
    torch.testing.assert_close(theirs_logits, logits, rtol=1e-4, atol=1e-4)
    back = load_model(str(tmp_path / "out")).student  # what launch/evaluate.py reads
    assert torch.equal(back.logit_bias(), student.logit_bias())
    torch.testing.assert_close(back.encode_image(pixels), student.encode_image(pixels))
