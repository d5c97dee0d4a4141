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
OF_RUN = ("train.hang_timeout", "train.evaluate_at", "train.upload_to", "train.wandb")
"""Keys that hold for the whole run, whose first start checks them or reads them once."""
READ_WITH = {
    "optimizer.name": ("betas", "eps"),
    "text.reduce": ("word_counts", "threshold"),
}
"""Keys that another key of their section gives a meaning: where a stage changes that one and not
them, they are the default again."""
WHOLE = ("captions", "kwargs")
"""Keys whose values are mappings, but no sections: a stage gives them as a whole."""


def values_of_next_stage(values: dict[str, Any]) -> dict[str, Any]:
    """The values of the recipe's next stage, whose `stages` are those that follow it.

    Its order of samples and its views are new ones: unless it says otherwise, its seed is the next.

    Args:
        values: all values of a recipe that has stages, as model_dump gives them.

    Raises:
        ConfigError: the stage has no length of its own, or changes what goes on.
    """
    changes, *rest = values["stages"]
    if "stages" in changes or _value(changes, "model.init"):
        key = "stages" if "stages" in changes else "model.init"
        raise ConfigError(
            f"a stage in stages gives {key}, but it goes on with the weights of the stage before "
            "it; remove the key"
        )
    train = changes.get("train")
    if not isinstance(train, dict) or not {"epochs", "samples"} & train.keys():
        raise ConfigError(
            f"a stage in stages is {changes}, which does not say how long it is; give it "
            "train: {epochs: ...} or train: {samples: ...}"
        )
    if train.get("epochs") is not None and train.get("samples") is not None:
        raise ConfigError(
            f"a stage in stages gives train.epochs {train['epochs']} and train.samples "
            f"{train['samples']}, two lengths; remove one of them"
        )
    merged = _merge(values | {"model": values["model"] | {"init": ""}}, changes)
    for key in (*FIXED, *OF_RUN):
        before, after = _value(values, key), _value(merged, key)
        is_section = isinstance(_value(merged, key.rpartition(".")[0]), dict)
        if before != after and is_section:  # the section itself is checked like all values
            reason = "it holds for the whole run" if key in OF_RUN else "the towers stay the same"
            raise ConfigError(
                f"a stage in stages changes {key} from {before!r} to {after!r}, but {reason}; "
                "remove the key"
            )
    name, before = (_value(each, "optimizer.name") for each in (merged, values))
    if name != before and _value(merged, "optimizer.keep_state"):
        raise ConfigError(
            f"optimizer.keep_state is true, but optimizer.name is {name} after a stage with "
            f"{before}, whose state is another; set it to false"
        )
    for key, read in READ_WITH.items():
        section = key.partition(".")[0]
        if isinstance(changes.get(section), dict) and _value(merged, key) != _value(values, key):
            for name in set(read) - changes[section].keys():
                del merged[section][name]
    if "seed" not in train:
        merged["train"]["seed"] = values["train"]["seed"] + 1
    if "samples" not in train:
        merged["train"]["samples"] = None
    return merged | {"stages": rest}


def _merge(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = copy.deepcopy(values)
    for key, change in changes.items():
        before = merged.get(key)
        both = isinstance(before, dict) and isinstance(change, dict) and key not in WHOLE
        merged[key] = _merge(before, change) if both else copy.deepcopy(change)
    return merged


def _value(values: Any, key: str) -> Any:
    """The value of a key such as model.text.name; None where a part of it is no section."""
    for name in key.split("."):
        values = values.get(name) if isinstance(values, dict) else None
    return values
