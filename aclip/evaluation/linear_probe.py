"""A linear probe: logistic regression on frozen features of the image tower, on all ranks together.

The regression is scikit-learn's LogisticRegression, fitted by the same L-BFGS of scipy with loss
and gradient summed over the ranks, so that features need not fit on one of them.

Source: CLIP, arXiv:2103.00020, appendix A.3: features in front of the projection, L-BFGS with 1,000
iterations at most, the penalty chosen on held-out samples between 1e-6 and 1e6.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from aclip import distributed
from aclip.errors import ConfigError
from aclip.evaluation.metrics import zero_shot
from aclip.evaluation.metrics.ranking import MAX_SCORES
from aclip.evaluation.sets.evaluation_set import NO_LABEL, EvaluationSet, read_validation
from aclip.evaluation.towers import Progress, Towers, image_encoder

STEPS_PER_DECADE = 8
LOWEST, HIGHEST = -6, 6
"""Exponents of ten of the penalty."""
HELD_OUT = 10
"""Every tenth training sample is held out to choose the penalty; the last fit sees it too."""
OPTIONS = {"maxiter": 1000, "maxls": 50, "gtol": 1e-9, "ftol": 1e-14}
"""The fit ends where no entry of the mean loss's gradient is larger than gtol."""


def fit(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    penalty: float,
    start: Tensor | None = None,
) -> Tensor:
    """Minimises the sum of cross-entropies + penalty / 2 * |W|^2 over the samples of all ranks.

    That is scikit-learn's LogisticRegression(C=1 / penalty); the biases are not penalised. Rank 0
    runs the optimizer, the others answer it, so that ranks whose arithmetic differs in the last bit
    take the same steps all the same.

    Args:
        features: (n, D) float, this rank's samples.
        labels: (n,) int64, their classes.
        num_classes: K.
        penalty: the factor of |W|^2 / 2, above 0.
        start: (K, D + 1) float64, where to begin; None for zeros.

    Returns:
        (K, D + 1) float64, weights and, last, biases; equal on every rank.

    Raises:
        ConfigError: scipy is not installed.
    """
    minimize = _scipy_minimize()
    shape, device = (num_classes, features.shape[1] + 1), features.device
    size = torch.tensor([len(features)], dtype=torch.float64, device=device)
    num_samples = _sum(size).item()

    def evaluate(weights: Tensor) -> Tensor:
        """(1 + K * (D + 1),): the mean loss of all ranks' samples and its gradient."""
        summed = _sum(_loss_and_gradient(features, labels, weights)) / num_samples
        scale = penalty / num_samples
        summed[0] += scale / 2 * weights[:, :-1].square().sum()
        summed[1:].view(shape)[:, :-1] += scale * weights[:, :-1]
        return summed

    def ask(x: np.ndarray) -> tuple[float, np.ndarray]:
        weights = _from_rank_0(torch.from_numpy(x).to(device).view(shape), True)[0]
        summed = evaluate(weights).cpu().numpy()
        return float(summed[0]), summed[1:]

    if start is None:
        start = torch.zeros(shape, dtype=torch.float64, device=device)
    if distributed.rank() == 0:
        result = minimize(ask, start.flatten().cpu().numpy(), jac=True, method="L-BFGS-B",
                          options=OPTIONS)  # fmt: skip
        solution = torch.from_numpy(result.x).to(device).view(shape)
        return _from_rank_0(solution, False)[0]
    while True:
        weights, goes_on = _from_rank_0(start, True)
        if not goes_on:
            return weights
        evaluate(weights)


def _from_rank_0(weights: Tensor, goes_on: bool) -> tuple[Tensor, bool]:
    """Rank 0's weights, and whether it asks for more."""
    message = torch.cat([weights.flatten(), weights.new_tensor([float(goes_on)])])
    if distributed.world_size() > 1:
        dist.broadcast(message, 0)
    return message[:-1].view_as(weights), bool(message[-1])


def _scipy_minimize() -> Callable:
    try:
        from scipy.optimize import minimize
    except ImportError:
        raise ConfigError(
            "--linear_probe needs the package scipy, which is not installed; pip install "
            "-e '.[eval]' in the checkout"
        ) from None
    return minimize


def _loss_and_gradient(features: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """The sum of this rank's cross-entropies and its gradient, flat: (1 + K * (D + 1),) float64."""
    total = weights.new_zeros(1 + weights.numel())
    gradient = total[1:].view_as(weights)
    chunk = max(1, MAX_SCORES // len(weights))
    for rows, classes in zip(features.split(chunk), labels.split(chunk), strict=True):
        rows = rows.double()
        log_probs = F.log_softmax(rows @ weights[:, :-1].T + weights[:, -1], dim=1)
        total[0] -= log_probs.gather(1, classes[:, None]).sum()
        residual = log_probs.exp_()
        residual[torch.arange(len(rows), device=rows.device), classes] -= 1
        gradient[:, :-1].addmm_(residual.T, rows)
        gradient[:, -1] += residual.sum(0)
    return total


def _sum(x: Tensor) -> Tensor:
    if distributed.world_size() > 1:
        dist.all_reduce(x)
    return x


def choose_penalty(score: Callable[[float], Any]) -> float:
    """The penalty with the best score.

    Every second decade is tried first, then penalties ever closer to the best one. Among equal
    scores the largest penalty wins.

    Args:
        score: gives a penalty's score, of any type that can be compared, higher is better. It is
            called at most once for each penalty.
    """
    last = (HIGHEST - LOWEST) * STEPS_PER_DECADE
    scores: dict[int, Any] = {}

    def try_steps(steps: list[int]) -> int:
        for step in sorted(steps, reverse=True):
            if 0 <= step <= last and step not in scores:
                scores[step] = score(_penalty(step))
        return max(scores, key=lambda step: (scores[step], step))

    width = 2 * STEPS_PER_DECADE
    best = try_steps(list(range(0, last + 1, width)))
    while width > 1:
        width //= 2
        best = try_steps([best - width, best + width])
    return _penalty(best)


def _penalty(step: int) -> float:
    return 10 ** (LOWEST + step / STEPS_PER_DECADE)


def linear_probe(
    towers: Towers,
    encode_features: Callable[[Tensor], Tensor],
    train: EvaluationSet,
    test: EvaluationSet,
    batch_size: int,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Learns from one split, scores the other.

    Args:
        towers: how images are read.
        encode_features: (n, 3, R, R) normalised pixels -> (n, D), in eval mode.
        train, test: sets with labels.
        batch_size: images of one call on one rank.
        progress: hears from time to time what is done.

    Returns:
        linear_probe_top{1,5}, linear_probe_mean_per_class, with two classes linear_probe_roc_auc
        unless only one of them has images, and linear_probe_penalty.

    Raises:
        ConfigError: a split has no labelled sample.
    """

    def features_of(dataset: EvaluationSet, words: str) -> tuple[Tensor, Tensor, Tensor]:
        return _features(towers, encode_features, dataset, batch_size, words, progress)

    features, labels, places = features_of(train, "training images")
    test_features, test_labels, _ = features_of(test, "test images")
    highest = torch.stack([t.max() if len(t) else t.new_tensor(-1) for t in (labels, test_labels)])
    num_classes = int(distributed.all_gather_rows(highest).max()) + 1
    held_out = places % HELD_OUT == 0
    fits: list[Tensor] = []

    def score(penalty: float) -> tuple[float, float]:
        """Accuracy on the held-out samples; of equal ones the smaller loss is better."""
        # The last solution is near this one's, since penalties come from large to small.
        start = fits[-1] if fits else None
        fits.append(fit(features[~held_out], labels[~held_out], num_classes, penalty, start))
        kept = features[held_out], labels[held_out]
        ranks, classes = _ranks(*kept, fits[-1])
        share = zero_shot.accuracy(ranks, classes)["top1"]
        loss = _sum(_loss_and_gradient(*kept, fits[-1])[:1]).item()
        if progress is not None:
            progress(f"penalty {penalty:.2g} gives {100 * share:.1f} on held-out samples", 1, 1)
        return share, -loss

    penalty = choose_penalty(score)
    weights = fit(features, labels, num_classes, penalty, fits[-1])
    ranks, classes = _ranks(test_features, test_labels, weights)
    metrics = zero_shot.accuracy(ranks, classes)
    if num_classes == 2 and classes.unique().numel() == 2:
        own = zero_shot.margins(_with_one(test_features), weights)
        metrics["roc_auc"] = zero_shot.roc_auc(distributed.all_gather_rows(own), classes)
    metrics["penalty"] = penalty
    return {f"linear_probe_{name}": value for name, value in metrics.items()}


def _with_one(features: Tensor) -> Tensor:
    """(n, D) -> (n, D + 1), so that a bias is one more weight."""
    return F.pad(features, (0, 1), value=1.0)


def _ranks(features: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Ranks of the right classes and the labels of all ranks' samples."""
    ranks = zero_shot.rank_classes(_with_one(features), weights, labels)
    return distributed.all_gather_rows(ranks), distributed.all_gather_rows(labels)


@torch.no_grad()
def _features(
    towers: Towers,
    encode_features: Callable[[Tensor], Tensor],
    dataset: EvaluationSet,
    batch_size: int,
    words: str,
    progress: Progress | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Features (n, D) fp32, labels (n,) and places in the set (n,) of this rank's samples."""
    rank, world_size = distributed.rank(), distributed.world_size()
    mine = len(range(rank, dataset.num_samples, world_size))
    run, parts, done = image_encoder(towers, encode_features), [], 0
    for batch in read_validation(
        dataset, towers.resolution, batch_size, rank, world_size, towers.resample
    ):
        labelled = batch.labels != NO_LABEL
        features = run(batch.images)[: len(labelled)][labelled.to(towers.device)]
        parts.append(
            (features, *(t[labelled].to(towers.device) for t in (batch.labels, batch.indices)))
        )
        done += len(batch.indices) + batch.skipped.total()
        if progress is not None:
            progress(words, done, mine)
    features, labels, places = (torch.cat(part) for part in zip(*parts, strict=True))
    if not int(_sum(torch.tensor([len(labels)], device=towers.device))):
        raise ConfigError(
            f"{dataset.name} has no sample with a label, which a linear probe learns from; give "
            "images in folders of their classes, or shards with .cls"
        )
    return features, labels, places
