"""A linear probe: logistic regression on frozen features of the image tower, on all ranks together.

The regression is scikit-learn's LogisticRegression, fitted by the same L-BFGS of scipy with loss
and gradient summed over the ranks, so that features need not fit on one of them.

Source: CLIP, arXiv:2103.00020, appendix A.3: features in front of the projection, L-BFGS with 1,000
iterations at most, the penalty chosen on held-out samples between 1e-6 and 1e6.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from aclip import distributed
from aclip.errors import ConfigError
from aclip.evaluation.metrics import zero_shot
from aclip.evaluation.metrics.ranking import MAX_SCORES
from aclip.evaluation.penalty import MOST_FITS, choose_penalty
from aclip.evaluation.sets.evaluation_set import NO_LABEL, EvaluationSet, read_validation
from aclip.evaluation.together import raise_together
from aclip.evaluation.towers import Progress, Towers, image_encoder

HELD_OUT = 10
"""Every tenth training sample is held out to choose the penalty; the last fit sees it too."""
MOST_CLASSES = 100_000
"""A label beyond is a slip, and its class's weights would fill memory."""
OPTIONS = {"maxiter": 1000, "maxls": 50, "gtol": 1e-9, "ftol": 1e-14}
"""The fit ends where no entry of the mean loss's gradient is larger than gtol."""


def fit(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    penalty: float,
    start: Tensor | None = None,
    heard: Callable[[int], None] | None = None,
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
        heard: hears on rank 0 after each evaluation of the loss how many there were.

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

    num_asked = 0

    def ask(x: np.ndarray) -> tuple[float, np.ndarray]:
        nonlocal num_asked
        weights = _from_rank_0(torch.from_numpy(x).to(device).view(shape), True)[0]
        summed = evaluate(weights).cpu().numpy()
        num_asked += 1
        if heard is not None:
            heard(num_asked)
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
        ConfigError: a split has no labelled sample, the training split has one alone or one class
            alone, or a label is beyond MOST_CLASSES.
        DataError: a split can't be read to its end.
    """

    def features_of(dataset: EvaluationSet, words: str) -> tuple[Tensor, Tensor, Tensor]:
        return _features(towers, encode_features, dataset, batch_size, words, progress)

    features, labels, places = features_of(train, "training images")
    test_features, test_labels, _ = features_of(test, "test images")
    highest = torch.stack([t.max() if len(t) else t.new_tensor(-1) for t in (labels, test_labels)])
    num_classes = int(distributed.all_gather_rows(highest).max()) + 1
    every_place = distributed.all_gather_rows(places).sort().values
    _check_classes(train, distributed.all_gather_rows(labels), num_classes)
    # Counted among the labelled samples, so that neither part is empty whatever is skipped.
    held_out = torch.searchsorted(every_place, places) % HELD_OUT == 0
    fits: list[Tensor] = []

    def heard(penalty: float) -> Callable[[int], None] | None:
        if progress is None:
            return None
        words = f"linear probe, fit {len(fits) + 1} of at most {MOST_FITS}, penalty {penalty:.2g}"
        return lambda steps: progress(f"{words}: {steps} steps", 0, 1)

    def score(penalty: float) -> tuple[float, float]:
        """Accuracy on the held-out samples; of equal ones the smaller loss is better."""
        # The last solution is near this one's, since penalties come from large to small.
        start = fits[-1] if fits else None
        seen = features[~held_out], labels[~held_out]
        fits.append(fit(*seen, num_classes, penalty, start, heard(penalty)))
        kept = features[held_out], labels[held_out]
        ranks, classes = _ranks(*kept, fits[-1])
        share = zero_shot.accuracy(ranks, classes)["top1"]
        loss = _sum(_loss_and_gradient(*kept, fits[-1])[:1]).item()
        if progress is not None:
            words = f"linear probe, penalty {penalty:.2g}"
            progress(f"{words} gives {100 * share:.1f} % on held-out samples", 1, 1)
        return share, -loss

    penalty = choose_penalty(score)
    weights = fit(features, labels, num_classes, penalty, fits[-1], heard(penalty))
    ranks, classes = _ranks(test_features, test_labels, weights)
    metrics = zero_shot.accuracy(ranks, classes)
    if num_classes == 2 and classes.unique().numel() == 2:
        own = zero_shot.margins(_with_one(test_features), weights)
        metrics["roc_auc"] = zero_shot.roc_auc(distributed.all_gather_rows(own), classes)
    metrics["penalty"] = penalty
    return {f"linear_probe_{name}": value for name, value in metrics.items()}


def _check_classes(train: EvaluationSet, labels: Tensor, num_classes: int) -> None:
    """labels: (n,) int64 of all ranks' training samples."""
    if num_classes > MOST_CLASSES:
        raise ConfigError(
            f"{train.name} or its test split has the label {num_classes - 1}, and a linear probe "
            f"takes {MOST_CLASSES:,} classes at most; count labels from 0"
        )
    if labels.unique().numel() < 2:
        raise ConfigError(
            f"{train.name} has {len(labels):,} labelled images, all of the class "
            f"{int(labels[0])}, and a linear probe tells classes apart; give images of two or more"
        )


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
    run, parts, done, error = image_encoder(towers, encode_features), [], 0, None
    for batch in read_validation(
        dataset, towers.resolution, batch_size, rank, world_size, towers.resample
    ):
        error = batch.error
        labelled = batch.labels != NO_LABEL
        features = run(batch.images)[: len(labelled)][labelled.to(towers.device)]
        parts.append(
            (features, *(t[labelled].to(towers.device) for t in (batch.labels, batch.indices)))
        )
        done += len(batch.indices) + batch.skipped.total()
        if progress is not None:
            progress(words, done, mine)
    raise_together(error)
    features, labels, places = (torch.cat(part) for part in zip(*parts, strict=True))
    if not int(_sum(torch.tensor([len(labels)], device=towers.device))):
        raise ConfigError(
            f"{dataset.name} has {dataset.num_samples:,} samples but none with a label that can be "
            "used, which a linear probe needs; give images in folders of their classes, or shards "
            "with .cls"
        )
    return features, labels, places
