"""How metrics count the samples of a set that can't be used, by kind."""

from collections.abc import Mapping

SKIPPED = "num_skipped_"
"""In front of the kind."""


def show_kinds(skipped: Mapping[str, float]) -> str:
    """`bad_label 2, no_image 1`."""
    return ", ".join(f"{kind} {number:,.0f}" for kind, number in sorted(skipped.items()))


def skipped_kinds(metrics: dict[str, float]) -> dict[str, float]:
    """The numbers of unusable samples in the metrics of `evaluate_set`, by kind."""
    return {n.removeprefix(SKIPPED): v for n, v in metrics.items() if n.startswith(SKIPPED)}
