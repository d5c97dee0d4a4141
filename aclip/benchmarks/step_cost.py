"""The paper's cost table on this machine: a step of each system, interleaved in one run.

All systems stay in memory and take turns, so that a machine whose speed drifts is fair to each; a
ratio is the median of the rounds' ratios. On a CPU the time is CPU time, since wall time counts
other processes too, and freed memory is kept, as on a GPU; there it is between CUDA events, and a
second table says what the GPU did and what was predicted.
"""

import argparse
import contextlib
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from aclip.benchmarks.device_work import (
    DeviceWork,
    OnGpu,
    Predicted,
    device_table,
    device_work,
    predict_steps,
)
from aclip.benchmarks.host_pages import kept_pages
from aclip.benchmarks.peak_memory import peak_growth
from aclip.cli import MIB, text_table
from aclip.config.ds_config import DsConfig, read_ds_config
from aclip.config.recipe import Recipe
from aclip.config.recipe_file import load_recipe
from aclip.data.batch import join
from aclip.data.synthetic import caption_lengths, synthetic_batch
from aclip.distributed import default_to_one_rank
from aclip.engine.optimizer import optimizer_bytes
from aclip.engine.process_group import init_distributed
from aclip.errors import ConfigError
from aclip.files import check_writable, write_whole
from aclip.planning.measure_step import measure_step
from aclip.planning.open_clip_step import OpenClipStep
from aclip.training.stepper import Stepper

# On a GPU: what ds_configs/zero2.json says, with small buckets and without a stream of its own for
# them, since one rank sends nothing and they would count as the step's memory.
ON_GPU = {
    "bf16": {"enabled": True},
    "zero_optimization": {
        "stage": 2,
        "overlap_comm": False,
        "contiguous_gradients": True,
        "reduce_bucket_size": 20_000_000,
    },
    "data_types": {"grad_accum_dtype": "fp32"},
    "gradient_clipping": 0.0,
}
ON_CPU = {"zero_optimization": {"stage": 0}, "gradient_clipping": 0.0}


@dataclass
class System:
    """One row of the table.

    Attributes:
        name: what the table calls it.
        step: runs one optimizer update.
        state_bytes: what weights, optimizer and teacher take between steps.
        gflops: of one sample, forward and backward; None where it is not counted.
        seconds: the time of a step in each round.
        peak_bytes: what a step takes at its peak, on top of what stays between steps.
        work: what a GPU does in a step; None on a CPU.
        predicted: what was predicted of it; None where nothing was.
    """

    name: str
    step: Callable[[], object]
    state_bytes: int
    gflops: float | None
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    work: DeviceWork | None = None
    predicted: Predicted | None = None


@dataclass(frozen=True)
class Row:
    """What the table says of a system; times in seconds, memory in MiB."""

    name: str
    step_seconds: float
    ratios: dict[str, float]
    """The time over each baseline's, median over the rounds."""
    spread: tuple[float, float]
    """Least and greatest ratio to the first baseline."""
    images_per_second: float
    gflops: float | None
    state_mib: float
    step_mib: float
    on_gpu: OnGpu | None = None


def benchmark_steps(arguments: argparse.Namespace) -> int:
    """Runs `launch/benchmark.py`; returns the exit status."""
    for name, least in (("rounds", 1), ("threads", 1), ("batch_size", 2)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name} is {value}; give {least} or more")
    if arguments.json:
        check_writable(Path(arguments.json).absolute().parent, "the folder of --json")
    on_gpu = torch.cuda.is_available()
    batch_size = arguments.batch_size or (128 if on_gpu else 8)
    # Every recipe is read before the first one is built, which takes time.
    overrides = [*arguments.set, f"train.global_batch_size={batch_size}", "data.train=demo"]
    recipes = {name: load_recipe(name, overrides) for name in arguments.recipes}
    baseline = arguments.baseline or arguments.recipes[0]
    if baseline not in recipes:
        raise ConfigError(f"--baseline is {baseline}, which is not among {', '.join(recipes)}")
    if not on_gpu:
        torch.set_num_threads(arguments.threads)
    default_to_one_rank()
    device = init_distributed()
    ds_config = _ds_config(ON_GPU if on_gpu else ON_CPU, batch_size)
    predicted, systems = {}, []
    if on_gpu:
        predicted = predict_steps(recipes, ds_config, arguments.against == "open_clip", device)
    for name, recipe in recipes.items():
        print(f"building {name}", flush=True)
        systems.append(_build(name, recipe, ds_config, batch_size, device))
    baselines = [baseline]
    if arguments.against == "open_clip":
        print("building open_clip", flush=True)
        systems += _build_open_clip(next(iter(recipes.values())), batch_size, device)
        baselines.append(systems[-2].name)
    _measure(systems, arguments.rounds, device)
    if on_gpu:
        for system in systems:
            system.work, system.predicted = device_work(system.step), predicted.get(system.name)
    rows = [make_row(system, systems, baselines, batch_size) for system in systems]
    environment = _environment(device, batch_size, arguments, next(iter(recipes.values())))
    print(format_table(rows, baselines, environment))
    if arguments.json:
        content = {"environment": environment, "rows": [asdict(row) for row in rows]}
        write_whole(Path(arguments.json), json.dumps(content, indent=2))
    return 0


def format_table(rows: list[Row], baselines: list[str], environment: dict) -> str:
    """The rows as text, the environment below."""
    ratios = [f"/ {name}" for name in baselines]
    cells = [["", "s a step", *ratios, "min - max", "img/s", "GFLOP", "state MiB", "step MiB"]]
    for row in rows:
        line = [row.name, f"{row.step_seconds:.4g}"]
        line += [f"{row.ratios[name]:.3f}" for name in baselines]
        line += [f"{row.spread[0]:.3f}-{row.spread[1]:.3f}", f"{row.images_per_second:.4g}"]
        line.append("" if row.gflops is None else f"{row.gflops:.1f}")
        cells.append([*line, f"{row.state_mib:,.0f}", f"{row.step_mib:,.0f}"])
    legend = "GFLOP: of one image-caption pair, forward and backward; step: on top of state"
    facts = ", ".join(f"{key} {value}" for key, value in environment.items())
    of_gpu = [(row.name, row.step_seconds, row.on_gpu) for row in rows if row.on_gpu is not None]
    return "\n".join([text_table(cells), legend, *device_table(of_gpu), facts])


def _ds_config(values: dict, batch_size: int) -> DsConfig:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "ds_config.json"
        path.write_text(json.dumps(values))
        return read_ds_config(str(path), batch_size, 1)


def _build(
    name: str, recipe: Recipe, ds_config: DsConfig, batch_size: int, device: torch.device
) -> System:
    stepper = Stepper(recipe, ds_config, device)
    synthetic = synthetic_batch(recipe, batch_size)
    batch = join([synthetic], pin=device.type == "cuda")  # as the loader hands it over
    momentum = 1.0 if recipe.teacher is None else recipe.teacher.momentum
    return System(
        name,
        lambda: stepper.step(batch, recipe.optimizer.lr, momentum),
        _state_bytes(stepper),
        measure_step(recipe, synthetic, modes=("none",)).total_flops / 1e9,
    )


def _build_open_clip(recipe: Recipe, batch_size: int, device: torch.device) -> list[System]:
    plain = OpenClipStep(recipe, batch_size, device)
    state_bytes = plain.state_bytes()
    return [
        System("open_clip", lambda: plain.step(0.0), state_bytes, None),
        System("open_clip, patch dropout 0.5", lambda: plain.step(0.5), state_bytes, None),
    ]


def _measure(systems: list[System], rounds: int, device: torch.device) -> None:
    gc.disable()  # a collection would fall into somebody's step
    for system in systems:
        system.step()  # makes the optimizer's state
        gc.collect()
        system.peak_bytes = peak_growth(system.step, device)
    with kept_pages():
        for system in systems:
            system.step()  # takes the pages
        for index in range(rounds):
            for system in systems:
                gc.collect()
                with _clock(device) as seconds:
                    system.step()
                system.seconds.append(seconds[0])
            print(f"round {index + 1} of {rounds}", flush=True)
    gc.enable()


@contextlib.contextmanager
def _clock(device: torch.device) -> Iterator[list[float]]:
    result: list[float] = []
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        yield result
        end.record()
        end.synchronize()
        result.append(start.elapsed_time(end) / 1000)
    else:
        before = time.process_time()
        yield result
        result.append(time.process_time() - before)


def _state_bytes(stepper: Stepper) -> int:
    """Weights, both moments, fp32 masters where the weights are not, and the teacher."""
    module, teacher = stepper.engine.module, stepper.teacher
    tensors = list(module.parameters())
    if teacher is not None:
        tensors += [*teacher.model.parameters(), *teacher.state_dict().values()]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return sum(storages.values()) + optimizer_bytes(trained, stepper.dtype)


def make_row(system: System, systems: list[System], baselines: list[str], batch_size: int) -> Row:
    """Medians over the rounds; a ratio is the median of the rounds' ratios."""
    by_name = {other.name: other for other in systems}
    ratios = {
        name: [a / b for a, b in zip(system.seconds, by_name[name].seconds, strict=True)]
        for name in baselines
    }
    seconds = statistics.median(system.seconds)
    first = ratios[baselines[0]]
    on_gpu = None
    if system.work is not None:
        busy_share = system.work.busy_seconds / seconds
        on_gpu = OnGpu(system.work.launches, busy_share, system.predicted)
    return Row(
        system.name,
        seconds,
        {name: statistics.median(values) for name, values in ratios.items()},
        (min(first), max(first)),
        batch_size / seconds,
        system.gflops,
        system.state_bytes / MIB,
        system.peak_bytes / MIB,
        on_gpu,
    )


def _environment(device, batch_size, arguments, recipe) -> dict:
    if device.type == "cuda":
        where = {"device": torch.cuda.get_device_name(device), "time": "CUDA events, bf16"}
    else:
        where = {
            "device": f"CPU {platform.machine()}, {arguments.threads} threads",
            "time": "CPU time, fp32",
        }
    lengths = caption_lengths(batch_size, recipe.model.text.context_length)
    return {
        **where,
        "batch": batch_size,
        "rounds": arguments.rounds,
        "mean caption": f"{sum(lengths) / batch_size:.1f} tokens",
        "torch": torch.__version__,
        "deepspeed": version("deepspeed"),
        "open_clip": version("open_clip_torch"),
    }
