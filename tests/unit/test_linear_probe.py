"""The linear probe's fit against scikit-learn's optimum, and which penalty is chosen."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from grey_images import Greys, probe
from sklearn.linear_model import LogisticRegression

from aclip.errors import ConfigError
from aclip.evaluation.linear_probe import fit
from aclip.evaluation.penalty import choose_penalty
from aclip.evaluation.sets.evaluation_set import NO_LABEL


def problem(num_samples, width, num_classes, seed=0):
    """Overlapping classes of which the first is the most frequent."""
    generator = torch.manual_seed(seed)
    weights = 1.0 / (1 + torch.arange(num_classes))
    labels = weights.multinomial(num_samples, replacement=True, generator=generator)
    centres = torch.randn(num_classes, width, generator=generator)
    features = 0.5 * centres[labels] + torch.randn(num_samples, width, generator=generator) + 3
    return features, labels


def loss(weights, features, labels, penalty):
    logits = features.double() @ weights[:, :-1].T + weights[:, -1]
    cross_entropy = F.cross_entropy(logits, labels, reduction="sum")
    return (cross_entropy + penalty / 2 * weights[:, :-1].square().sum()).item()


@pytest.mark.parametrize(
    "num_samples, width, num_classes, penalty",
    [(300, 8, 3, 1e-2), (300, 8, 3, 1e3), (200, 40, 12, 1.0), (200, 40, 12, 1e3)],
)
def test_fit_is_scikit_learns_optimum(num_samples, width, num_classes, penalty):
    features, labels = problem(num_samples, width, num_classes)
    ours = fit(features, labels, num_classes, penalty)
    judge = LogisticRegression(C=1 / penalty, max_iter=10_000, tol=1e-9)
    judge.fit(features.double().numpy(), labels.numpy())
    theirs = torch.from_numpy(np.column_stack([judge.coef_, judge.intercept_]))
    expected = loss(theirs, features, labels, penalty)
    assert loss(ours, features, labels, penalty) == pytest.approx(expected, rel=1e-6)
    # The loss is flat around the optimum, so that weights agree less closely than it does.
    error = (ours[:, :-1] - theirs[:, :-1]).norm() / theirs[:, :-1].norm()
    assert error < 2e-3


def test_fit_of_two_classes_is_scikit_learns_with_the_margin_halved():
    """It fits one weight vector w for two classes; ours are -w/2 and w/2, at half the penalty."""
    features, labels = problem(200, 5, 2)
    ours = fit(features, labels, 2, 1.0)
    judge = LogisticRegression(C=2.0, max_iter=10_000, tol=1e-9)
    judge.fit(features.double().numpy(), labels.numpy())
    torch.testing.assert_close(
        (ours[1] - ours[0])[:-1], torch.from_numpy(judge.coef_[0]), rtol=1e-3, atol=1e-4
    )


def test_a_start_elsewhere_ends_at_the_same_optimum():
    features, labels = problem(200, 10, 4)
    cold = fit(features, labels, 4, 1.0)
    warm = fit(features, labels, 4, 1.0, fit(features, labels, 4, 100.0))
    assert loss(warm, features, labels, 1.0) == pytest.approx(
        loss(cold, features, labels, 1.0), rel=1e-9
    )


@pytest.mark.parametrize("best", [-6, -3.125, 0.25, 3.5, 6])
def test_the_best_of_97_penalties_is_found_in_at_most_15_fits(best):
    tried = []

    def score(penalty):
        tried.append(penalty)
        return -abs(np.log10(penalty) - best)

    assert np.log10(choose_penalty(score)) == pytest.approx(best)
    assert len(tried) == len(set(tried)) <= 15
    assert tried[:7] == sorted(tried[:7], reverse=True)


def test_of_equal_scores_the_largest_penalty_counts():
    assert choose_penalty(lambda penalty: 0.5) == pytest.approx(1e6)


def test_probe_learns_from_one_split_and_scores_the_other():
    values = [20, 40, 60, 80, 120, 150, 180, 200] * 5
    labels = [0, 0, 0, 0, 1, 1, 1, 1] * 5
    # The images without a label count nowhere; 90 and 110 lie on their class's side of 100.
    test = Greys([90, 110, 250, 130, 10, 5], [0, 1, 1, 0, NO_LABEL, NO_LABEL])
    metrics = probe(Greys(values, labels), test)
    assert metrics["linear_probe_top1"] == pytest.approx(3 / 4)
    assert metrics["linear_probe_mean_per_class"] == pytest.approx((1 / 2 + 1) / 2)
    # Pairs of a 1 (110, 250) and a 0 (90, 130): 110 is below 130 alone.
    assert metrics["linear_probe_roc_auc"] == pytest.approx(3 / 4)
    assert 1e-6 <= metrics["linear_probe_penalty"] <= 1e6


def test_a_split_without_labels_is_refused():
    with pytest.raises(ConfigError, match="greys has 2 samples but none with a label"):
        probe(Greys([1, 2], [NO_LABEL] * 2), Greys([1], [0]))


def test_a_test_split_without_images_is_refused():
    with pytest.raises(ConfigError, match="greys has 1 samples but none with a label"):
        probe(Greys([1, 200, 2], [0, 1, 0]), Greys([1], [NO_LABEL]))


@pytest.mark.parametrize("labels", [[0], [3, 3, 3]])
def test_one_class_is_refused(labels):
    with pytest.raises(ConfigError, match=f"greys has {len(labels)} labelled images, all of the"):
        probe(Greys([10] * len(labels), labels), Greys([10], [0]))


def test_a_label_that_would_fill_memory_is_refused():
    with pytest.raises(ConfigError, match="has the label 999999999, .* 100,000 classes at most"):
        probe(Greys([10, 20], [0, 999_999_999]), Greys([10], [0]))


def test_two_images_are_enough_wherever_they_lie_among_unlabelled_ones():
    # Place 0, which would be held out, and place 10 have no label.
    labels = [NO_LABEL, 0, 1, *[NO_LABEL] * 8]
    metrics = probe(Greys([10, 20, 200, *[10] * 8], labels), Greys([30, 190], [0, 1]))
    # The one that is left to the fits that choose has one class; the last fit sees both.
    assert metrics["linear_probe_top1"] == 1.0


def test_more_classes_than_images_are_learned_as_far_as_they_are_seen():
    metrics = probe(Greys([20, 220], [0, 9]), Greys([30, 210, 128], [0, 9, 5]))
    assert metrics["linear_probe_top1"] == pytest.approx(2 / 3)


def test_features_without_variance_score_as_guessing_the_most_frequent_class():
    metrics = probe(Greys([50] * 40, [0, 1, 1, 1] * 10), Greys([50] * 4, [0, 1, 1, 1]))
    assert metrics["linear_probe_top1"] == pytest.approx(3 / 4)


def test_a_model_whose_features_are_not_finite_is_right_about_nothing():
    metrics = probe(
        Greys([20, 220] * 20, [0, 1] * 20), Greys([30, 210], [0, 1]), scale=float("nan")
    )
    assert metrics["linear_probe_top1"] == metrics["linear_probe_roc_auc"] == 0


def test_progress_is_heard_within_a_fit():
    heard = []
    metrics = probe(
        Greys([20, 40, 200, 220] * 10, [0, 0, 1, 1] * 10),
        Greys([30, 210], [0, 1]),
        progress=lambda *words: heard.append(words),
    )
    assert metrics["linear_probe_top1"] == 1.0
    steps = [words for words, done, total in heard if done < total and "steps" in words]
    assert steps[0] == "linear probe, fit 1 of at most 16, penalty 1e+06: 1 steps"
    assert len(steps) > 20
