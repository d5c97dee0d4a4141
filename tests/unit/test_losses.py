"""The loss terms in one process: tiny vectors by hand, and plain float64 loops."""

import math

import pytest
import torch
import torch.nn.functional as F
from small_recipe import SMALL_RECIPE

from aclip.config.recipe_file import load_recipe
from aclip.method.losses.byol import byol
from aclip.method.losses.contrastive import contrastive
from aclip.method.losses.simclr import simclr
from aclip.method.losses.term import StudentOutput, total


def vectors(*rows):
    return torch.tensor(rows, dtype=torch.float32)


def unit(vector):
    return vector / vector.pow(2).sum().sqrt()


def cross_entropy(logits, label):
    """-log softmax(logits)[label] of a list of scalars."""
    return sum(torch.exp(logit - logits[label]) for logit in logits).log()


def slow_contrastive(images, texts, scale):
    """One image and one text at a time, as the CLIP paper writes it."""
    batch, num_views = images.shape[:2]
    terms = []
    for view in range(num_views):
        for i in range(batch):
            image, text = unit(images[i, view]), unit(texts[i])
            to_texts = [scale * image @ unit(texts[j]) for j in range(batch)]
            to_images = [scale * text @ unit(images[j, view]) for j in range(batch)]
            terms += [cross_entropy(to_texts, i) / 2, cross_entropy(to_images, i) / 2]
    return sum(terms) / (batch * num_views)


def slow_simclr(embeds, temperature):
    """NT-Xent over a list of 2 B vectors: everybody but itself is a candidate."""
    batch = embeds.shape[0]
    everyone = [(i, view) for view in range(2) for i in range(batch)]
    terms = []
    for i, view in everyone:
        others = [other for other in everyone if other != (i, view)]
        logits = [unit(embeds[i, view]) @ unit(embeds[o]) / temperature for o in others]
        terms.append(cross_entropy(logits, others.index((i, 1 - view))))
    return sum(terms) / len(terms)


def slow_byol(predictions, targets):
    batch, num_views = predictions.shape[:2]
    terms = [
        2 - 2 * unit(predictions[i, view]) @ unit(targets[i])
        for i in range(batch)
        for view in range(num_views)
    ]
    return sum(terms) / len(terms)


def random_embeds(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def leaves(*tensors, dtype):
    return [t.detach().to(dtype).requires_grad_() for t in tensors]


def assert_loss_and_gradients(actual_loss, actual_inputs, expected_loss, expected_inputs):
    assert actual_loss.dtype == torch.float32
    assert actual_loss.shape == ()
    torch.testing.assert_close(actual_loss.double(), expected_loss, rtol=2e-6, atol=1e-6)
    actual_loss.backward()
    expected_loss.backward()
    for actual, expected in zip(actual_inputs, expected_inputs, strict=True):
        scale = expected.grad.abs().max().item()
        assert scale > 0
        difference = (actual.grad.double() - expected.grad.reshape(actual.shape)).abs().max().item()
        assert difference <= 1e-5 * scale


def test_contrastive_of_two_orthogonal_pairs_by_hand():
    images = vectors([[5, 0]], [[0, 0.1]])  # lengths do not matter
    texts = vectors([2, 0], [0, 3])
    loss = contrastive(images, texts, torch.tensor([3.0]))
    # Every row and column of logits is (3, 0) with the 3 at the label.
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-3)), rel=1e-6)


def test_contrastive_of_two_views_is_their_mean():
    right, wrong = [[1, 0], [0, 1]], [[0, 1], [1, 0]]
    images = vectors([right[0], wrong[0]], [right[1], wrong[1]])
    loss = contrastive(images, vectors([1, 0], [0, 1]), torch.tensor([2.0]))
    expected = (math.log(1 + math.exp(-2)) + math.log(1 + math.exp(2))) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_contrastive_weighs_both_directions_equally():
    images = vectors([[1, 0]], [[1, 0]])
    texts = vectors([1, 0], [0, 1])
    # image to text: (s, 0) twice, labels 0 and 1; text to image: (s, s) and (0, 0), always log 2.
    loss = contrastive(images, texts, torch.tensor([1.0]))
    image_to_text = (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(1))) / 2
    assert loss.item() == pytest.approx((image_to_text + math.log(2)) / 2, rel=1e-6)


def test_contrastive_of_equal_embeds_is_the_log_of_the_batch_size():
    loss = contrastive(torch.ones(7, 2, 3), torch.ones(7, 3), torch.tensor([100.0]))
    assert loss.item() == pytest.approx(math.log(7), rel=1e-6)


def test_contrastive_in_uneven_chunks_equals_the_whole(monkeypatch):
    images, texts = random_embeds(7, 2, 5), random_embeds(7, 5, seed=1)
    whole = slow_contrastive(images.double(), texts.double(), 20.0)
    monkeypatch.setattr("aclip.method.losses.contrastive.CHUNK_ROWS", 3)
    loss = contrastive(images, texts, torch.tensor([20.0]))
    assert loss.item() == pytest.approx(whole.item(), rel=2e-6)


def test_simclr_of_two_equal_views_by_hand():
    embeds = vectors([[1, 0], [4, 0]], [[0, 2], [0, 1]])
    # Each view: its positive at cosine 1, the other image's two views at 0.
    expected = math.log(1 + 2 * math.exp(-1 / 0.5))
    assert simclr(embeds, 0.5).item() == pytest.approx(expected, rel=1e-6)


def test_simclr_of_two_different_views_by_hand():
    embeds = vectors([[1, 0], [0, 1]], [[0, 1], [-1, 0]])
    e = math.exp(1 / 0.5)
    # The positives have cosine 0; the negatives of the rows (-1, 0), (1, 0), (1, 0), (-1, 0).
    expected = (2 * math.log(2 + 1 / e) + 2 * math.log(2 + e)) / 4
    assert simclr(embeds, 0.5).item() == pytest.approx(expected, rel=1e-6)


def test_simclr_of_one_view_twice_differs_from_that_of_both():
    embeds = random_embeds(5, 2, 8)
    twice = embeds[:, :1].repeat(1, 2, 1)
    assert simclr(twice, 0.1).item() < simclr(embeds, 0.1).item() - 0.5


def test_byol_by_hand():
    predictions = vectors([[3, 0], [0, 2]], [[-1, 0], [1, 1]])
    targets = vectors([1, 0], [5, 0])
    # 2 - 2 cos: 0, 2, 4, 2 - sqrt(2)
    assert byol(predictions, targets).item() == pytest.approx(
        (0 + 2 + 4 + 2 - math.sqrt(2)) / 4, rel=1e-6
    )


def test_byol_gives_the_target_no_gradient():
    predictions, targets = leaves(random_embeds(3, 2, 4), random_embeds(3, 4), dtype=torch.float32)
    byol(predictions, targets).backward()
    assert targets.grad is None
    assert predictions.grad.abs().max() > 0


@pytest.mark.parametrize("num_views", [1, 2])
@pytest.mark.parametrize("scale", [14.3, 100.0])
def test_contrastive_and_its_gradients_equal_float64_loops(num_views, scale):
    inputs = (random_embeds(5, num_views, 6), random_embeds(5, 6, seed=1), torch.tensor([scale]))
    actual = leaves(*inputs, dtype=torch.float32)
    expected = leaves(*inputs, dtype=torch.float64)
    expected_loss = slow_contrastive(*expected[:2], expected[2].squeeze())
    assert_loss_and_gradients(contrastive(*actual), actual, expected_loss, expected)


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_simclr_and_its_gradients_equal_float64_loops(temperature):
    inputs = random_embeds(5, 2, 6, seed=2)
    actual, expected = leaves(inputs, dtype=torch.float32), leaves(inputs, dtype=torch.float64)
    actual_loss = simclr(actual[0], temperature)
    assert_loss_and_gradients(actual_loss, actual, slow_simclr(expected[0], temperature), expected)


@pytest.mark.parametrize("num_views", [1, 2])
def test_byol_and_its_gradients_equal_float64_loops(num_views):
    inputs, targets = random_embeds(5, num_views, 6, seed=3), random_embeds(5, 6, seed=4)
    actual, expected = leaves(inputs, dtype=torch.float32), leaves(inputs, dtype=torch.float64)
    expected_loss = slow_byol(expected[0], targets.double())
    assert_loss_and_gradients(byol(actual[0], targets), actual, expected_loss, expected)


def test_swapping_the_views_changes_no_loss():
    embeds, other, scale = random_embeds(6, 2, 8), random_embeds(6, 8, seed=1), torch.tensor([10.0])
    swapped = embeds.flip(1)
    for loss in (
        lambda e: contrastive(e, other, scale),
        lambda e: simclr(e, 0.1),
        lambda e: byol(e, other),
    ):
        assert loss(swapped).item() == pytest.approx(loss(embeds).item(), rel=1e-6)


def test_bf16_embeds_are_read_exactly_and_give_an_fp32_loss():
    images, texts = random_embeds(4, 2, 8).bfloat16(), random_embeds(4, 8, seed=1).bfloat16()
    scale = torch.tensor([14.0])
    for actual, expected in (
        (
            contrastive(images, texts, scale),
            slow_contrastive(images.double(), texts.double(), 14.0),
        ),
        (simclr(images, 0.1), slow_simclr(images.double(), 0.1)),
        (byol(images, texts), slow_byol(images.double(), texts.double())),
    ):
        assert actual.dtype == torch.float32
        assert actual.item() == pytest.approx(expected.item(), rel=1e-5)


def terms_of(**weights):
    """The small recipe's loss terms with these weights; others have none."""
    values = {"simclr": 0, "byol": 0, "distill": 0, "mlm": 0} | weights
    overrides = [f"loss.{name}={weight}" for name, weight in values.items()]
    return load_recipe(SMALL_RECIPE, [*overrides, "loss.simclr_temperature=0.2"]).terms


def full_output():
    return StudentOutput(
        image_embeds=random_embeds(4, 2, 6).requires_grad_(),
        text_embeds=random_embeds(4, 6, seed=1),
        logit_scale=torch.tensor([12.0]),
        heads={
            "simclr": random_embeds(4, 2, 5, seed=2),
            "byol": random_embeds(4, 2, 7, seed=3),
            "mlm": torch.tensor([1.0, 2.0, 0.0, 5.0]),
        },
    )


def test_total_weighs_the_terms_and_reports_them_unweighted():
    output, target = full_output(), random_embeds(4, 7, seed=4)
    terms = terms_of(contrastive=0.5, simclr=3.0, byol=2.0, mlm=0.25)
    loss, values = total(terms, output, {"byol": target})
    expected = {
        "contrastive": slow_contrastive(output.image_embeds, output.text_embeds, 12.0).item(),
        "simclr": slow_simclr(output.heads["simclr"], 0.2).item(),
        "byol": slow_byol(output.heads["byol"], target).item(),
        "mlm": 2.0,
    }
    assert {name: value.item() for name, value in values.items()} == pytest.approx(
        expected, rel=1e-5
    )
    weighted = 0.5 * expected["contrastive"] + 3 * expected["simclr"] + 2 * expected["byol"] + 0.5
    assert loss.item() == pytest.approx(weighted, rel=1e-5)
    assert loss.requires_grad
    assert not any(value.requires_grad for value in values.values())


def test_term_without_weight_is_neither_computed_nor_reported():
    output = full_output()
    output.heads.clear()
    loss, values = total(terms_of(contrastive=1.0), output, {})
    assert list(values) == ["contrastive"]
    assert loss.item() == values["contrastive"].item()


def test_slow_formulas_agree_with_torch_on_the_trivial_case():
    """The loops above are themselves checked: without scale and views they are F.cross_entropy."""
    images, texts = (
        F.normalize(random_embeds(4, 6), dim=-1),
        F.normalize(random_embeds(4, 6), dim=-1),
    )
    logits = images @ texts.T
    expected = (
        F.cross_entropy(logits, torch.arange(4)) + F.cross_entropy(logits.T, torch.arange(4))
    ) / 2
    assert slow_contrastive(images[:, None], texts, 1.0).item() == pytest.approx(
        expected.item(), rel=1e-5
    )
