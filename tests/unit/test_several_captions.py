"""Several captions of an image as positives: what is drawn, what a batch holds, what a loss is."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_recipe import SMALL_RECIPE

from aclip.config.recipe_file import load_recipe
from aclip.data.batch import join
from aclip.data.samples import draw_others
from aclip.data.synthetic import batch_of_mean_captions, synthetic_batch
from aclip.data.tokenizer import Tokenizer
from aclip.errors import ConfigError
from aclip.method.losses import several_captions
from aclip.method.losses.contrastive import contrastive
from aclip.method.losses.several_captions import contrastive_of_several, sigmoid_of_several
from aclip.method.losses.sigmoid import sigmoid
from aclip.method.tokens import Tokens
from aclip.models.student import StudentInput, build_student
from aclip.planning.measure_step import measure_step

THREE = ["data.captions_per_image=3"]
COUNTS = torch.tensor([3, 1, 2, 3, 1])
BATCH, PLACES = len(COUNTS), 3
PAIRS = [(i, j) for i in range(BATCH) for j in range(COUNTS[i])]
"""(image, place) of each caption that there is."""


def cosine(a, b):
    return a @ b / (a.norm() * b.norm())


def slow_contrastive(images, texts, scale):
    total = 0
    for view in images.unbind(1):
        for i in range(BATCH):
            to_texts = {pair: scale * cosine(view[i], texts[pair]) for pair in PAIRS}
            log_sum = torch.stack(list(to_texts.values())).exp().sum().log()
            for j in range(COUNTS[i]):
                to_images = torch.stack([scale * cosine(other, texts[i, j]) for other in view])
                both = log_sum - to_texts[i, j] + to_images.exp().sum().log() - to_images[i]
                total = total + both / (2 * COUNTS[i])
    return total / (BATCH * images.shape[1])


def slow_sigmoid(images, texts, scale, bias):
    total = 0
    for view in images.unbind(1):
        for i in range(BATCH):
            for pair in PAIRS:
                logit = scale * cosine(view[i], texts[pair]) + bias
                total = total + torch.log1p(torch.exp(-logit if pair[0] == i else logit))
    return total / (BATCH * images.shape[1])


LOSSES = {
    "contrastive": (contrastive_of_several, slow_contrastive, contrastive, [11.0]),
    "sigmoid": (sigmoid_of_several, slow_sigmoid, sigmoid, [9.0, -7.0]),
}


@pytest.mark.parametrize("chunk", [2**25, 2 * BATCH * PLACES], ids=["whole", "two rows"])
@pytest.mark.parametrize("num_views", [1, 2])
@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradients_equal_float64_loops(name, num_views, chunk, monkeypatch):
    monkeypatch.setattr(several_captions, "CHUNK_LOGITS", chunk)
    loss_of, slow, _, numbers = LOSSES[name]
    torch.manual_seed(0)
    inputs = [torch.randn(BATCH, num_views, 6), torch.randn(BATCH, PLACES, 6)]
    inputs += [torch.tensor([number]) for number in numbers]
    exact = [tensor.double().requires_grad_() for tensor in inputs]
    images, texts, *numbers = ours = [tensor.requires_grad_() for tensor in inputs]
    loss, expected = loss_of(images, texts, COUNTS, *numbers), slow(*exact).squeeze()
    assert loss.dtype == torch.float32 and loss.shape == ()
    torch.testing.assert_close(loss.double(), expected, rtol=2e-6, atol=0)
    gradients = torch.autograd.grad(loss, ours)
    for actual, theirs in zip(gradients, torch.autograd.grad(expected, exact), strict=True):
        assert (actual.double() - theirs).abs().max() <= 1e-5 * theirs.abs().max() > 0
    is_empty = torch.arange(PLACES) >= COUNTS.unsqueeze(1)
    assert is_empty.sum() == 5 and (gradients[1][is_empty] == 0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_with_one_caption_each_it_is_the_ordinary_loss(name):
    loss_of, _, ordinary, numbers = LOSSES[name]
    torch.manual_seed(1)
    images, texts = torch.randn(BATCH, 2, 6), torch.randn(BATCH, PLACES, 6)
    numbers = [torch.tensor([number]) for number in numbers]
    ones = torch.ones(BATCH, dtype=torch.int64)
    expected = ordinary(images, texts[:, 0], *numbers)
    torch.testing.assert_close(loss_of(images, texts, ones, *numbers), expected)


def test_two_images_by_hand():
    images = torch.tensor([[[2.0, 0.0]], [[0.0, 1.0]]])
    right, wrong = [1.0, 0.0], [0.0, 1.0]
    texts = torch.tensor([[right, wrong], [wrong, right]])
    one, scale = torch.tensor([2, 1]), torch.tensor([1.0])
    # Three captions: logits (1, 0, 0) of the first image, whose target is half of the first two,
    # and (0, 1, 1) of the second, whose caption is the third.
    to_texts = math.log(math.e + 2) - 0.5 + math.log(1 + 2 * math.e) - 1
    # The first image's captions have the logits (1, 0) and (0, 1), the second's (0, 1).
    good, bad = math.log(1 + math.e) - 1, math.log(1 + math.e)
    to_images = (good + bad) / 2 + good
    loss = contrastive_of_several(images, texts, one, scale)
    assert loss.item() == pytest.approx((to_texts + to_images) / 4, rel=1e-6)
    # z * logit: 1, 0 and -0; then -0, -1 and 1.
    softplus = [math.log(1 + math.exp(-z)) for z in (1, 0, 0, 0, -1, 1)]
    loss = sigmoid_of_several(images, texts, one, scale, torch.zeros(1))
    assert loss.item() == pytest.approx(sum(softplus) / 2, rel=1e-6)


def test_other_captions_are_different_and_none_is_invented():
    rng = np.random.default_rng(0)
    captions = ["a", "b", "b", "c", "a", "d"]
    seen = [draw_others(rng, captions, "a", 2) for _ in range(200)]
    assert {tuple(sorted(pair)) for pair in seen} == {("b", "c"), ("b", "d"), ("c", "d")}
    assert set(seen) == {(x, y) for x in "bcd" for y in "bcd" if x != y}
    few = draw_others(rng, captions, "a", 5)
    assert sorted(few[:3]) == ["b", "c", "d"] and few[3:] == (None, None)
    assert draw_others(rng, ["a", "a"], "a", 2) == (None, None)
    state = rng.bit_generator.state
    assert draw_others(rng, captions, "a", 0) == () and rng.bit_generator.state == state


def test_tokens_are_split_and_joined_by_images():
    recipe = load_recipe(SMALL_RECIPE, THREE)
    ids = torch.arange(6 * 8).view(6, 8)
    tokens = Tokens(ids, torch.arange(1, 7), num_captions=torch.tensor([3, 1]))
    batch = replace(synthetic_batch(recipe, 2), tokens=tokens)
    first, second = batch.split(1)
    assert len(first.tokens) == len(second.tokens) == 1 and len(tokens) == 2
    assert torch.equal(second.tokens.ids, ids[3:])
    assert second.tokens.lengths.tolist() == [4, 5, 6]
    assert (first.tokens.num_captions.item(), second.tokens.num_captions.item()) == (3, 1)
    narrow = Tokens(ids[:3, :4], first.tokens.lengths, num_captions=torch.tensor([2]))
    joined = join([second, replace(first, tokens=narrow)]).tokens
    assert torch.equal(joined.ids[:3], ids[3:]) and not joined.ids[3:, 4:].any()
    assert joined.num_captions.tolist() == [1, 2]
    located = tokens.map(lambda tensor: tensor + 0)
    assert torch.equal(located.num_captions, tokens.num_captions)
    assert torch.equal(located.real_ids, tokens.located().real_ids)


@torch.no_grad()
def test_packed_captions_have_the_features_that_each_has_alone():
    student = build_student(load_recipe(SMALL_RECIPE, [*THREE, "mask.policy=none", "teacher=null"]))
    texts = ["a red ring", "two stars", "one long caption of many words", "blue", "", ""]
    tokenizer = Tokenizer(student.text.context_length)
    tokens = replace(tokenizer.encode(texts), num_captions=torch.tensor([3, 1]))
    encoded = student.encode(StudentInput(torch.zeros(2, 1, 3, 64, 64), None, tokens.located()))
    alone = torch.cat([student.text(tokenizer.encode([text]).located()) for text in texts])
    torch.testing.assert_close(encoded["text"].flatten(0, 1), alone, rtol=1e-5, atol=1e-5)
    embeds = student.project(encoded)["text_embeds"]
    assert embeds.shape == (2, 3, student.text_projection.out_features)


def test_masked_language_modelling_takes_one_caption():
    with pytest.raises(ConfigError, match="loss.mlm is 1 with data.captions_per_image 3"):
        load_recipe(SMALL_RECIPE, [*THREE, "loss.mlm=1"])


@pytest.mark.parametrize("loss", ["contrastive", "sigmoid"])
def test_planner_counts_every_caption(loss):
    chosen = ["loss.contrastive=0", "loss.sigmoid=1"] if loss == "sigmoid" else []
    one, three = load_recipe(SMALL_RECIPE, chosen), load_recipe(SMALL_RECIPE, [*chosen, *THREE])
    plain, several = (
        measure_step(recipe, batch_of_mean_captions(recipe, 12, 32), modes=("none",))
        for recipe in (one, three)
    )
    assert several.flops["text"].total == pytest.approx(3 * plain.flops["text"].total)
    assert several.flops["image"] == plain.flops["image"]
    # Forward, two gradients, and the logits again, of two views: 2 * E * N columns a row.
    product = 2 * 2 * 96 * 3 * 32 * (1 if loss == "sigmoid" else 2)
    parts = ("losses", "logit_bias")  # the bias's gradient comes in between
    flops = sum(several.flops[part].total for part in parts if part in several.flops)
    assert flops == pytest.approx(4 * product)
