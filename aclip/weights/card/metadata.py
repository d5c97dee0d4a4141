"""The block of metadata at the head of a card, as the Hub reads it."""

import re

from huggingface_hub import EvalResult, ModelCardData

from aclip.weights.card.options import CardOptions
from aclip.weights.card.run_facts import Evaluated

LIBRARIES = {"open_clip": "open_clip", "huggingface": "transformers", "safetensors": "generic"}
"""What the Hub calls the library that loads a format."""
TASK = "zero-shot-image-classification"


def metadata(output_format: str, options: CardOptions, title: str, results: list[Evaluated]) -> str:
    """The metadata as YAML; zero-shot results are entries of its model-index.

    Args:
        output_format: as launch/export.py calls it.
        title: what the card calls the model.
        results: all results of the model.
    """
    entries = [
        EvalResult(
            task_type=TASK,
            task_name="Zero-shot classification",
            dataset_type=re.sub(r"[^a-z0-9]+", "-", each.set_name.lower()).strip("-") or "set",
            dataset_name=each.title,
            metric_type="accuracy" if each.metric != "ROC AUC" else "roc_auc",
            metric_name=f"{each.metric}, %",
            metric_value=round(each.percent, 2),
        )
        for each in results
        if each.kind == "zero_shot" and each.percent is not None
    ]
    return ModelCardData(
        license=options.license,
        library_name=LIBRARIES[output_format],
        pipeline_tag=TASK,
        tags=["clip", "aclip", "image-text-embeddings"],
        model_name=title if entries else None,
        eval_results=entries or None,
    ).to_yaml()
