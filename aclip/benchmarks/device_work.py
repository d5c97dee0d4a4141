"""What a GPU does in a step, from torch's profiler, and what is predicted of it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from aclip.benchmarks.spans import covered
from aclip.cli import text_table
from aclip.config.ds_config import DsConfig
from aclip.config.recipe import Recipe
from aclip.data.synthetic import caption_lengths
from aclip.planning.gpus import gpu_of_device
from aclip.planning.predictions import OPEN_CLIP, predict, predict_open_clip

LAUNCHED = ("kernel", "gpu_memcpy", "gpu_memset")
"""What the profiler calls that which runs on a GPU; an annotation is none of it."""


@dataclass(frozen=True)
class DeviceWork:
    """What a GPU does in a step.

    Attributes:
        launches: kernels, copies and fills.
        busy_seconds: the time in which at least one of them runs.
    """

    launches: int
    busy_seconds: float


@dataclass(frozen=True)
class Predicted:
    """What aclip/planning says of a step on this GPU before it ran."""

    launches: float
    seconds: float


@dataclass(frozen=True)
class OnGpu:
    """What a row of the cost table says of a step on a GPU.

    Attributes:
        launches: as in DeviceWork.
        busy_share: the part of the step's time in which the GPU works.
        predicted: None where nothing was predicted.
    """

    launches: int
    busy_share: float
    predicted: Predicted | None


def device_work(step: Callable[[], object]) -> DeviceWork | None:
    """Runs a step under the profiler, on a GPU; None where the profiler may not see its work."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    return work_of(profile.profiler.kineto_results.events())


def work_of(events: Iterable) -> DeviceWork | None:
    """The GPU's work among the events of a profile; None if there is none."""
    spans = [
        (event.start_ns(), event.start_ns() + event.duration_ns())
        for event in events
        if event.activity_type() in LAUNCHED
    ]
    return DeviceWork(len(spans), covered(spans) / 1e9) if spans else None


def predict_steps(
    recipes: dict[str, Recipe], ds_config: DsConfig, with_open_clip: bool, device: torch.device
) -> dict[str, Predicted]:
    """The prediction of each system's step by its name; nothing for a GPU that is not in the list.

    Args:
        ds_config: of the recipes, for one rank.
        with_open_clip: also predict open_clip's step with the towers of the first recipe.
    """
    gpu = gpu_of_device(torch.cuda.get_device_name(device))
    if gpu is None:
        return {}
    predictions = {}
    for name, recipe in recipes.items():
        lengths = caption_lengths(recipe.train.global_batch_size, recipe.model.text.context_length)
        tokens = sum(lengths) / len(lengths)
        predictions[name] = predict(name, recipe, ds_config, gpu, tokens)[0]
    if with_open_clip:
        predictions[OPEN_CLIP] = predict_open_clip(next(iter(recipes.values())), gpu)[0]
    return {
        name: Predicted(each.time.whole.launches, each.time.seconds)
        for name, each in predictions.items()
    }


def device_table(rows: list[tuple[str, float, OnGpu]]) -> list[str]:
    """What a GPU did in the steps beside what was predicted, and a legend; empty without rows.

    Args:
        rows: of each system its name, the seconds of a step, and what the GPU did.
    """
    if not rows:
        return []
    cells = [
        ["", "launches", "predicted", "busy", "ms a step", "predicted", "measured / predicted"]
    ]
    for name, seconds, gpu in rows:
        line = [name, f"{gpu.launches:,}", "", f"{gpu.busy_share:.0%}", f"{1e3 * seconds:.1f}"]
        if gpu.predicted is not None:
            line[2] = f"{gpu.predicted.launches:,.0f}"
            ratio = seconds / gpu.predicted.seconds
            line += [f"{1e3 * gpu.predicted.seconds:.1f}", f"{ratio:.2f}"]
        cells.append(line)
    legend = (
        "launches: kernels, copies and fills; busy: share of the time in which one of them runs"
    )
    if all(gpu.predicted is None for _, _, gpu in rows):
        legend += "; predicted: nothing, as aclip/planning/gpus.py does not have this GPU"
    return [text_table(cells), legend]
