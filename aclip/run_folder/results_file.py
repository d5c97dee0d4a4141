"""What results of an evaluation are called and how they read, in results.json and in tables."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

METRICS = {
    "top1": "top-1",
    "mean_per_class": "mean per class",
    "mean_top1_top5": "mean of top-1 and top-5",
    "roc_auc": "ROC AUC",
}
"""What tables call a classification set's own metric."""
DIRECTIONS = {"image_to_text": "image to text", "text_to_image": "text to image"}
RECALLS = (1, 5, 10)


@dataclass(frozen=True)
class Score:
    """A number that tables show of a set.

    Attributes:
        kind: zero_shot, linear_probe, or a direction of retrieval.
        words: the metric in words.
        percent: the number; None where it is undefined.
        k: of retrieval, the recall's.
    """

    kind: Literal["zero_shot", "linear_probe", "image_to_text", "text_to_image"]
    words: str
    percent: float | None
    k: int = 0


def headline(metric: str, metrics: dict[str, float], kind: str = "zero_shot") -> float | None:
    """A set's own metric in percent, of zero-shot or of the linear_probe; None if undefined."""
    if metric == "mean_top1_top5":
        return 50 * (metrics[f"{kind}_top1"] + metrics[f"{kind}_top5"])
    value = metrics.get(f"{kind}_{metric}")
    return None if value is None else 100 * value


def scores(metric: str, metrics: dict[str, float]) -> Iterator[Score]:
    """What tables show of a set's metrics.

    Args:
        metric: the set's own metric, a key of METRICS; anything for a set of retrieval alone.
        metrics: shares in [0, 1] and counts, as evaluate_set gives them.
    """
    for kind, prefix in (("zero_shot", ""), ("linear_probe", "linear probe, ")):
        if f"{kind}_top1" in metrics:
            yield Score(kind, prefix + METRICS[metric], headline(metric, metrics, kind))
    for direction, words in DIRECTIONS.items():
        for k in RECALLS if f"{direction}_r1" in metrics else ():
            yield Score(direction, f"{words} R@{k}", 100 * metrics[f"{direction}_r{k}"], k)


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    """Each set's entry of a results.json by the set's name; none where there is no such file.

    Raises:
        ValueError: the file holds something else.
    """
    if not path.is_file():
        return {}
    values = json.loads(path.read_bytes())
    if not isinstance(values, dict) or not isinstance(values.get("sets"), dict):
        raise ValueError("it has no sets")
    return values["sets"]
