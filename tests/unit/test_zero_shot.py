"""Zero-shot accuracy against values worked out by hand."""

import math

import pytest
import torch

from aclip.evaluation.zero_shot import average_prompts, zero_shot_accuracy


def test_class_embedding_is_the_renormalised_mean_of_normalised_prompts():
    prompts = torch.tensor([[[10.0, 0.0], [0.0, 0.1]], [[3.0, 4.0], [3.0, 4.0]]])
    half = math.sqrt(0.5)  # of (1, 0) and (0, 1), however long they were
    torch.testing.assert_close(average_prompts(prompts), torch.tensor([[half, half], [0.6, 0.8]]))


def test_bf16_prompts_are_averaged_in_fp32():
    prompts = torch.ones(1, 3, 4, dtype=torch.bfloat16)
    assert average_prompts(prompts).dtype == torch.float32
    torch.testing.assert_close(average_prompts(prompts), torch.full((1, 4), 0.5))


def test_accuracy_of_an_unbalanced_set_counts_images_not_classes():
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
    assert zero_shot_accuracy(images, classes, labels) == {
        "zero_shot_top1": pytest.approx(2 / 5),
        "zero_shot_top5": pytest.approx(3 / 5),
    }


def test_equal_similarities_are_ordered_by_class_index():
    classes = torch.tensor([[1.0, 0.0]] * 3)
    images = torch.tensor([[1.0, 0.0]] * 4)
    labels = torch.tensor([0, 1, 2, 2])
    accuracy = zero_shot_accuracy(images, classes, labels, ks=(1, 2, 3))
    assert accuracy["zero_shot_top1"] == pytest.approx(1 / 4)
    assert accuracy["zero_shot_top2"] == pytest.approx(2 / 4)
    assert accuracy["zero_shot_top3"] == pytest.approx(4 / 4)


def test_collapsed_embeddings_score_at_chance_whatever_their_direction():
    direction = torch.nn.functional.normalize(
        torch.randn(33, generator=torch.manual_seed(0)), dim=0
    )
    labels = torch.arange(7).repeat(5)
    accuracy = zero_shot_accuracy(direction.expand(35, -1), direction.expand(7, -1), labels)
    assert accuracy["zero_shot_top1"] == pytest.approx(1 / 7)
    assert accuracy["zero_shot_top5"] == pytest.approx(5 / 7)


def test_nan_embeddings_are_never_right():
    images = torch.full((3, 2), torch.nan)
    accuracy = zero_shot_accuracy(images, torch.eye(2), torch.tensor([0, 1, 0]))
    assert accuracy == {"zero_shot_top1": 0.0, "zero_shot_top5": 0.0}  # though there are only two


def test_bf16_embeddings_that_differ_by_one_rounding_step_do_not_tie():
    classes = torch.tensor([[1.0, 0.0], [1.0078125, 0.0]])  # neighbours in bf16
    images = torch.tensor([[1.0, 0.0]])
    accuracy = zero_shot_accuracy(images.bfloat16(), classes.bfloat16(), torch.tensor([1]))
    assert accuracy["zero_shot_top1"] == 1.0
