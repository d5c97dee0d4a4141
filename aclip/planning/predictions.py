"""Steps of recipes and of open_clip on a GPU that need not be there, and how they read."""

from dataclasses import dataclass, replace

from aclip.cli import text_table
from aclip.config.ds_config import DsConfig
from aclip.config.recipe import Recipe
from aclip.data.synthetic import batch_of_mean_captions, mean_in_training
from aclip.planning.engine_operations import fused_adamw
from aclip.planning.gpus import Gpu
from aclip.planning.measure_step import measure_run
from aclip.planning.stage_shares import stage_shares, stage_title
from aclip.planning.step_kinds import describe_keep_ratio, teaching_share
from aclip.planning.step_time import (
    PartTime,
    StepTime,
    average_time,
    recipe_step_times,
    step_time,
)
from aclip.planning.trace_step import COMPILED, LOSSES, trace_open_clip
from aclip.planning.zero_memory import zero_settings

OPEN_CLIP = "open_clip"
NOTE = """Host: the time to launch a step, +-40 %.
Device: each operation takes as long as its bytes or its matrix products. Compiled: neighbours
without matrix products count as one operation that reads and writes once."""


@dataclass(frozen=True)
class Prediction:
    """A step of a system at a batch size.

    Attributes:
        system: a recipe's name, or open_clip.
        compiled: whether its towers are compiled by torch.compile.
        batch_size: the images of the step, on one GPU.
        time: the time of the step by part.
        flops: the FLOPs of the whole batch in matrix products that are needed once.
        gpu: the GPU that it is predicted for.
        in_bf16: whether the MFU is a share of the GPU's peak in bf16, not in fp32.
        teaching_share: the share of a run's steps that have the teacher's pass; the prediction is
            the average over all steps.
        keep_ratio: how it changes in the run, see describe_keep_ratio.
    """

    system: str
    compiled: bool
    batch_size: int
    time: StepTime
    flops: float
    gpu: Gpu
    in_bf16: bool = True
    teaching_share: float = 1.0
    keep_ratio: str = ""

    @property
    def name(self) -> str:
        return f"{self.system}, compiled" if self.compiled else self.system

    @property
    def images_per_second(self) -> float:
        return self.batch_size / self.time.seconds

    @property
    def mfu(self) -> float:
        peak = self.gpu.bf16_flops if self.in_bf16 else self.gpu.fp32_flops
        return self.flops / (self.time.seconds * peak)


def predict_run(
    name: str, recipe: Recipe, ds_config: DsConfig, gpu: Gpu, caption_tokens: float
) -> list[Prediction]:
    """The average step of a run with stages, and before it that of each stage; of a run without,
    what `predict` gives. All stages get the recipe's batch size."""
    stages = stage_shares(recipe, recipe.train.global_batch_size)
    found = [
        predict(stage_title(name, number, len(stages)), stage, ds_config, gpu, caption_tokens)
        for number, (stage, _) in enumerate(stages, start=1)
    ]
    if len(found) == 1:
        return found[0]
    shares = [share for _, share in stages]
    taught = [
        share * each[0].teaching_share
        for (stage, share), each in zip(stages, found, strict=True)
        if stage.needs_teacher_view
    ]

    def average(of_stages: tuple[Prediction, ...]) -> Prediction:
        pairs = list(zip(shares, of_stages, strict=True))
        return replace(
            of_stages[0],
            system=name,
            time=average_time([(share, each.time) for share, each in pairs]),
            flops=sum(share * each.flops for share, each in pairs),
            teaching_share=sum(taught) if taught else 1.0,
        )

    averages = [average(each) for each in zip(*found, strict=True)]
    return [prediction for stage in found for prediction in stage] + averages


def predict(
    name: str, recipe: Recipe, ds_config: DsConfig, gpu: Gpu, caption_tokens: float
) -> list[Prediction]:
    """A recipe's average step on one GPU, without and with model.compile.

    Args:
        name: what the recipe is called.
        ds_config: checked for one rank.
        caption_tokens: the whole captions' mean length; a step pads them to recipe.caption_tokens.
    """
    size, length = recipe.train.global_batch_size, mean_in_training(recipe, caption_tokens)
    settings, dtype = zero_settings(ds_config, 1), ds_config.dtype
    eager, compiled = recipe_step_times(recipe, dtype, settings, gpu, size, length)
    few = batch_of_mean_captions(recipe, length, recipe.caption_tokens)
    flops = size * measure_run(recipe, few, modes=("none",)).total_flops
    about_run = dtype.itemsize == 2, teaching_share(recipe), describe_keep_ratio(recipe)
    return [
        Prediction(name, False, size, eager, flops, gpu, *about_run),
        Prediction(name, True, size, compiled, flops, gpu, *about_run),
    ]


def predict_open_clip(recipe: Recipe, gpu: Gpu) -> list[Prediction]:
    """open_clip's step with the recipe's towers, eager and compiled."""
    batch_size = recipe.train.global_batch_size
    trace = trace_open_clip(recipe, batch_size)
    flops = sum(each.flops for each in trace.operations)
    update = fused_adamw(trace.trained)
    return [
        Prediction(
            OPEN_CLIP,
            compiled,
            batch_size,
            step_time(
                trace.compiled(COMPILED | {LOSSES} if compiled else set()) + update,
                gpu,
                len(trace.trained),
                stage=None,
                compiled=compiled,
            ),
            flops,
            gpu,
        )
        for compiled in (False, True)
    ]


def report(predictions: list[Prediction]) -> str:
    """The predictions as text: the parts of each at the largest batch, then all of them."""
    largest = max(each.batch_size for each in predictions)
    parts = [_parts(each) for each in predictions if each.batch_size == largest]
    gpu = predictions[0].gpu
    note = f"Predicted for one {gpu.name}, not measured. {NOTE}"
    shares = {each.system: each.teaching_share for each in predictions}
    averages = [
        f"\n{name}: the average over a run, in {share:.0%} of whose steps the teacher runs."
        for name, share in shares.items()
        if share < 1
    ]
    averages += [
        f"\n{name}: the average over a run, in which {keep_ratio}."
        for name, keep_ratio in {each.system: each.keep_ratio for each in predictions}.items()
        if keep_ratio
    ]
    return "\n\n".join([*parts, _summary(predictions), note + "".join(averages)])


def _parts(prediction: Prediction) -> str:
    title = f"{prediction.name}, {prediction.batch_size} images"
    rows = [[title, "launches", "host ms", "GB", "TFLOP", "device ms"]]

    def row(name: str, part: PartTime) -> list[str]:
        return [
            name,
            f"{part.launches:,.0f}",
            f"{part.host_seconds * 1e3:.1f}",
            f"{part.moved / 1e9:.1f}",
            f"{part.flops / 1e12:.2f}",
            f"{part.device_seconds * 1e3:.1f}",
        ]

    rows += [row(name, part) for name, part in prediction.time.parts.items() if part.launches]
    return text_table([*rows, row("sum", prediction.time.whole)])


def _summary(predictions: list[Prediction]) -> str:
    baselines = [OPEN_CLIP, f"{OPEN_CLIP}, compiled"]
    seconds = {(each.name, each.batch_size): each.time.seconds for each in predictions}
    compares = any(each.system == OPEN_CLIP for each in predictions)
    titles = ["images", "", "host ms", "device ms", "step ms", "bound by", "img/s", "MFU"]
    rows = [[*titles, *(f"/ {name}" for name in baselines if compares)]]
    for each in predictions:
        time = each.time
        rows.append(
            [
                str(each.batch_size),
                each.name,
                f"{time.whole.host_seconds * 1e3:.1f}",
                f"{time.whole.device_seconds * 1e3:.1f}",
                f"{time.seconds * 1e3:.1f}",
                "host" if time.is_host_bound else "device",
                f"{each.images_per_second:,.0f}",
                f"{each.mfu:.0%}",
            ]
        )
        if compares:
            rows[-1] += [
                f"{time.seconds / seconds[name, each.batch_size]:.2f}" for name in baselines
            ]
    return text_table(rows, left=(1,))
