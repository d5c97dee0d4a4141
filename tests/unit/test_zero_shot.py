"""Zero-shot metrics against values worked out by hand, and against scikit-learn's."""

import math
import warnings

import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, roc_auc_score, top_k_accuracy_score

from aclip.evaluation.metrics.zero_shot import PromptMeans, accuracy, margins, rank_classes, roc_auc


def accuracy_of(images, classes, labels, ks=(1, 5)):
    return accuracy(rank_classes(images, classes, labels), labels, ks)


def means_of(prompts, classes, num_classes):
    means = PromptMeans(num_classes)
    means.add(prompts, classes)
    return means.class_embeds()


def test_class_embedding_is_the_renormalised_mean_of_normalised_prompts():
    prompts = torch.tensor([[10.0, 0.0], [3.0, 4.0], [0.0, 0.1], [3.0, 4.0]])
    half = math.sqrt(0.5)  # of (1, 0) and (0, 1), however long they were
    actual = means_of(prompts, torch.tensor([0, 1, 0, 1]), 2)
    torch.testing.assert_close(actual, torch.tensor([[half, half], [0.6, 0.8]]))


def test_classes_may_have_unequally_many_prompts_in_any_batches():
    generator = torch.manual_seed(0)
    prompts, classes = torch.randn(40, 8, generator=generator), torch.arange(40) % 7 % 3
    means = PromptMeans(3)
    for start in (0, 1, 14, 15):
        end = {0: 1, 1: 14, 14: 15, 15: 40}[start]
        means.add(prompts[start:end], classes[start:end])
    for label in range(3):
        unit = prompts[classes == label] / prompts[classes == label].norm(dim=1, keepdim=True)
        expected = unit.mean(0) / unit.mean(0).norm()
        torch.testing.assert_close(means.class_embeds()[label], expected)
    assert torch.equal(means.class_embeds(), means_of(prompts, classes, 3))


def test_bf16_prompts_are_averaged_in_fp32():
    embeds = means_of(torch.ones(3, 4, dtype=torch.bfloat16), torch.zeros(3, dtype=torch.int64), 1)
    assert embeds.dtype == torch.float32
    torch.testing.assert_close(embeds, torch.full((1, 4), 0.5))


def test_accuracy_of_an_unbalanced_set_counts_images_and_the_mean_per_class_counts_classes():
    classes = torch.eye(6)
    images = torch.tensor(
        [
            [9.0, 1, 2, 3, 4, 5],  # class 0 is first
            [9.0, 1, 2, 3, 4, 5],
            [0.0, 5, 4, 3, 2, 1],  # class 0 is last: sixth
            [1.0, 0, 9, 8, 7, 6],  # class 1 is last, class 2 first
            [1.0, 2, 9, 8, 7, 6],  # class 1 is fifth
        ]
    )
    labels = torch.tensor([0, 0, 0, 1, 1])
    assert accuracy_of(images, classes, labels) == {
        "top1": pytest.approx(2 / 5),
        "top5": pytest.approx(3 / 5),
        "mean_per_class": pytest.approx((2 / 3 + 0) / 2),  # classes 2 to 5 have no image
    }


def test_the_docstring_example():
    scores = accuracy(torch.tensor([0, 0, 7, 0]), torch.tensor([0, 0, 0, 1]))
    assert scores == {"top1": 3 / 4, "top5": 3 / 4, "mean_per_class": (2 / 3 + 1) / 2}


def test_equal_similarities_are_ordered_by_class_index():
    classes = torch.tensor([[1.0, 0.0]] * 3)
    images = torch.tensor([[1.0, 0.0]] * 4)
    labels = torch.tensor([0, 1, 2, 2])
    scores = accuracy_of(images, classes, labels, ks=(1, 2, 3))
    assert scores["top1"] == pytest.approx(1 / 4)
    assert scores["top2"] == pytest.approx(2 / 4)
    assert scores["top3"] == pytest.approx(4 / 4)
    assert scores["mean_per_class"] == pytest.approx(1 / 3)


def test_collapsed_embeddings_score_at_chance_whatever_their_direction():
    direction = torch.nn.functional.normalize(
        torch.randn(33, generator=torch.manual_seed(0)), dim=0
    )
    labels = torch.arange(7).repeat(5)
    scores = accuracy_of(direction.expand(35, -1), direction.expand(7, -1), labels)
    assert scores["top1"] == pytest.approx(1 / 7)
    assert scores["top5"] == pytest.approx(5 / 7)
    two = margins(direction.expand(35, -1), direction.expand(2, -1))
    assert roc_auc(two, labels % 2) == 0.5


def test_nan_embeddings_are_never_right():
    images = torch.full((3, 2), torch.nan)
    labels = torch.tensor([0, 1, 0])
    scores = accuracy_of(images, torch.eye(2), labels)
    assert set(scores.values()) == {0.0}  # though there are only two classes
    assert roc_auc(margins(images, torch.eye(2)), labels) == 0.0


def test_bf16_embeddings_that_differ_by_one_rounding_step_do_not_tie():
    classes = torch.tensor([[1.0, 0.0], [1.0078125, 0.0]])  # neighbours in bf16
    images = torch.tensor([[1.0, 0.0]])
    scores = accuracy_of(images.bfloat16(), classes.bfloat16(), torch.tensor([1]))
    assert scores["top1"] == 1.0


def test_no_images_give_no_score():
    nothing = torch.zeros(0, dtype=torch.int64)
    assert accuracy(nothing, nothing) == {"top1": 0.0, "top5": 0.0, "mean_per_class": 0.0}


@pytest.mark.parametrize(
    "num_images, num_classes, present",
    [
        pytest.param(500, 9, 9, id="unbalanced"),
        pytest.param(200, 40, 13, id="classes without samples"),
        pytest.param(60, 6, 1, id="one class only"),
    ],
)
def test_accuracies_equal_scikit_learns(num_images, num_classes, present):
    generator = torch.manual_seed(num_images)
    # Class c about twice as often as class c + 1.
    weights = 0.5 ** torch.arange(present, dtype=torch.float64)
    labels = weights.multinomial(num_images, replacement=True, generator=generator)
    classes = torch.randn(num_classes, 16, generator=generator)
    images = classes[labels] + 2 * torch.randn(num_images, 16, generator=generator)
    logits = (images.double() @ classes.double().T).numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes that are predicted and never true
        expected = {
            "mean_per_class": balanced_accuracy_score(labels, logits.argmax(1)),
            **{
                f"top{k}": top_k_accuracy_score(labels, logits, k=k, labels=range(num_classes))
                for k in (1, 5)
            },
        }
    assert 0 < expected["top1"] < 1
    assert accuracy_of(images, classes, labels) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(
    "scores",
    [
        pytest.param(lambda noise, labels: noise + labels, id="informative"),
        pytest.param(lambda noise, labels: (2 * (noise + labels)).round() / 2, id="many ties"),
        pytest.param(lambda noise, labels: 0 * noise, id="all tied"),
        pytest.param(lambda noise, labels: -noise - 3 * labels, id="worse than chance"),
    ],
)
@pytest.mark.parametrize("num_positive", [1, 37, 299])
def test_roc_auc_equals_scikit_learns(scores, num_positive):
    labels = (torch.arange(300) % 300 < num_positive).long()
    values = scores(torch.randn(300, generator=torch.manual_seed(num_positive)), labels)
    assert roc_auc(values, labels) == pytest.approx(roc_auc_score(labels, values), abs=1e-12)


def test_roc_auc_by_hand():
    labels = torch.tensor([0, 1, 0, 1])
    # Pairs of a 1 and a 0: 0.5 ties with 0.5, is below 0.9; 0.7 is above 0.5, below 0.9.
    assert roc_auc(torch.tensor([0.5, 0.5, 0.9, 0.7]), labels) == (0.5 + 0 + 1 + 0) / 4
    assert math.isnan(roc_auc(torch.tensor([0.1, 0.2]), torch.tensor([1, 1])))
    assert math.isnan(roc_auc(torch.tensor([0.1, 0.2]), torch.tensor([0, 0])))


def test_margin_is_the_similarity_to_class_1_less_that_to_class_0():
    classes = torch.tensor([[0.6, 0.8], [1.0, 0.0]])
    actual = margins(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), classes)
    torch.testing.assert_close(actual, torch.tensor([0.4, -1.6]))
