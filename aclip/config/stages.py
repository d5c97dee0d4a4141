"""Stages of a run: what follows when a recipe's own epochs are done.

A recipe is its own first stage. `stages` lists those that follow, each as the keys that it changes
of the stage before it:

    model: {image: {resolution: 112}}
    train: {epochs: 6}
    stages:
      - {model: {image: {resolution: 224}}, train: {epochs: 0.3}, optimizer: {lr: 2.0e-5}}
"""

import copy
from typing import Any

from aclip.errors import ConfigError

FIXED = (
    "model.image.name",
    "model.image.kwargs",
    "model.text.name",
    "model.text.pooling",
    "model.text.width",
    "model.text.heads",
    "model.text.layers",
    "model.text.context_length",
    "model.embed_dim",
)
"""Keys that shape the towers, whose weights go on; positions are resized for another resolution."""


def values_of_next_stage(values: dict[str, Any]) -> dict[str, Any]:
    """The values of the recipe's next stage, whose `stages` are those that follow it.

    Its order of samples and its views are new ones: unless it says otherwise, its seed is the next.

    Args:
        values: all values of a recipe that has stages, as model_dump gives them.

    Raises:
        ConfigError: the stage has no length of its own, or changes what goes on.
    """
    changes, *rest = values["stages"]
    if "stages" in changes or changes.get("model", {}).get("init"):
        key = "stages" if "stages" in changes else "model.init"
        raise ConfigError(
            f"a stage in stages gives {key}, but it goes on with the weights of the stage before "
            "it; remove the key"
        )
    train = changes.get("train", {})
    if not {"epochs", "samples"} & train.keys():
        raise ConfigError(
            f"a stage in stages is {changes}, which does not say how long it is; give it "
            "train: {epochs: ...} or train: {samples: ...}"
        )
    merged = _merge(values, changes)
    for key in FIXED:
        before, after = _value(values, key), _value(merged, key)
        if before != after:
            raise ConfigError(
                f"a stage in stages changes {key} from {before} to {after}, but all stages train "
                "the same towers; remove the key"
            )
    name, before = (each["optimizer"]["name"] for each in (merged, values))
    if name != before:
        if merged["optimizer"]["keep_state"]:
            raise ConfigError(
                f"optimizer.keep_state is true, but optimizer.name is {name} after a stage with "
                f"{before}, whose state is another; set it to false"
            )
        for key in {"betas", "eps"} - changes["optimizer"].keys():
            del merged["optimizer"][key]  # the optimizer's own, where the stage gives none
    if "seed" not in train:
        merged["train"]["seed"] = values["train"]["seed"] + 1
    if "samples" not in train:
        merged["train"]["samples"] = None
    merged["model"]["init"] = ""
    return merged | {"stages": rest}


def _merge(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = copy.deepcopy(values)
    for key, change in changes.items():
        before = merged.get(key)
        both = isinstance(before, dict) and isinstance(change, dict)
        merged[key] = _merge(before, change) if both else copy.deepcopy(change)
    return merged


def _value(values: dict[str, Any], key: str) -> Any:
    for name in key.split("."):
        values = values[name]
    return values
