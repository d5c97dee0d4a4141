"""What may change between two starts of one run, and how two recipes or ds_configs differ."""

import json
import re
from collections.abc import Iterator
from typing import Any

from aclip.config.recipe import Recipe

MAY_CHANGE = frozenset(
    (
        "description",
        # Memory, speed and patience: what is computed stays the same.
        "model.image.recompute",
        "model.text.recompute",
        "model.compile",
        "data.workers",
        "data.retries",
        "data.cache",
        "data.cache_gb",
        "data.on_shard_error",
        "train.hang_timeout",
        # What a run tells of itself, and how often.
        "data.val",
        "train.evaluate_every",
        "train.evaluate_at",
        "train.log_every",
        "train.wandb",
        "train.checkpoint_every",
        "train.checkpoint_minutes",
        "train.keep_checkpoints",
        "train.keep_every",
        "train.upload_to",
    )
)
"""Keys of the recipe that a start may change without being asked."""
NEVER_CHANGE = frozenset(
    (
        "data.train",  # where the shards lie may change, the shards may not
        "data.sources",  # as a whole, where their number differs
        "data.sources.shards",
        "data.sources.weight",
        "data.lanes",
        "data.shuffle_block",
        "train.seed",
        "train.global_batch_size",
        "text.word_counts",  # where they lie may change, the counts may not
    )
)
"""Keys that decide which sample comes next, or what lies in files of the data: the checkpoint
itself knows what they were, and data/fingerprint.py refuses another effect of them, whatever the
start asks for."""
DS_RESULT = {
    "bf16.enabled": False,
    "gradient_clipping": 0.0,
    "communication_data_type": None,
    "sparse_gradients": False,
}
"""Keys of the ds_config that change what is learned, with DeepSpeed's defaults; all others, such as
ZeRO, micro-batch and buckets, say how it is computed, and may change."""


def recipe_changes(then: Recipe, now: Recipe) -> list[str]:
    """Each key that differs, as `optimizer.lr 0.001 -> 0.0005`."""
    pairs = _differences(then.model_dump(mode="json"), now.model_dump(mode="json"), "")
    return [f"{key} {_show(before)} -> {_show(after)}" for key, before, after in pairs]


def ds_config_changes(then: dict, now: dict) -> list[str]:
    """Each key of DS_RESULT that differs, written as `recipe_changes` does."""
    changes = []
    for key, default in DS_RESULT.items():
        before, after = _value(then, key, default), _value(now, key, default)
        if before != after:
            changes.append(f"{key} {_show(before)} -> {_show(after)} (ds_config)")
    return changes


def key_of(change: str) -> str:
    """The key that a change begins with, without the numbers of a list's items."""
    return re.sub(r"\.\d+(?=\.)", "", change.partition(" ")[0])


def may_change(change: str) -> bool:
    """Whether a change, also one of a later stage, is of a key that a start may change."""
    return key_of(change).removeprefix("stages.") in MAY_CHANGE


def _differences(then: Any, now: Any, key: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(then, dict) and isinstance(now, dict):
        for name in dict.fromkeys([*then, *now]):
            inner = f"{key}.{name}" if key else name
            yield from _differences(then.get(name), now.get(name), inner)
    elif _are_sections(then) and _are_sections(now) and len(then) == len(now):
        for index, (before, after) in enumerate(zip(then, now, strict=True)):
            yield from _differences(before, after, f"{key}.{index}")
    elif then != now:
        yield key, then, now


def _are_sections(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, dict) for each in value)


def _value(values: dict, key: str, default: Any) -> Any:
    for name in key.split("."):
        if not isinstance(values, dict) or name not in values:
            return default
        values = values[name]
    return values


def _show(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
