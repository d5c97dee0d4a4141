"""The paper's cost table on this machine: a step of each system, interleaved in one run.

All systems take turns (turns.py), and a ratio is the median of the rounds' ratios. A recipe whose
teacher rests in some steps, or that has stages, takes a turn with each kind of step, and its row is
their average over a run. On a CPU the time is CPU time, since wall time counts other processes too,
and freed memory is kept, as on a GPU; there it is between CUDA events, and a second table says what
the GPU did and what was predicted.
"""

import argparse
import json
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from aclip.benchmarks.cost_table import System, format_table, make_row, with_average
from aclip.benchmarks.device_work import Predicted, predict_steps
from aclip.benchmarks.turns import Build, take_turns
from aclip.config.ds_config import DsConfig, read_ds_config
from aclip.config.recipe import Recipe
from aclip.config.recipe_file import load_recipe
from aclip.data.batch import join
from aclip.data.synthetic import caption_lengths, synthetic_batch
from aclip.distributed import default_to_one_rank
from aclip.engine.optimizer import optimizer_bytes, student_groups
from aclip.engine.process_group import init_distributed
from aclip.errors import ConfigError
from aclip.files import check_writable, write_whole
from aclip.planning.measure_step import measure_step
from aclip.planning.open_clip_step import OpenClipStep
from aclip.planning.stage_shares import stage_shares, stage_title
from aclip.planning.step_kinds import StepKind, step_kinds
from aclip.training.stepper import Stepper

OPEN_CLIP = "open_clip"
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
    overrides = [*arguments.set, "data.train=demo"]
    # Stages have their own lengths and batches in a run, but one batch size here.
    stages = {
        name: stage_shares(load_recipe(name, overrides), batch_size) for name in arguments.recipes
    }
    recipes = {
        stage_title(name, number, len(of_name)): stage
        for name, of_name in stages.items()
        for number, (stage, _) in enumerate(of_name, start=1)
    }
    baseline = arguments.baseline or arguments.recipes[0]
    if baseline not in stages:
        raise ConfigError(f"--baseline is {baseline}, which is not among {', '.join(stages)}")
    if not on_gpu:
        torch.set_num_threads(arguments.threads)
    default_to_one_rank()
    device = init_distributed()
    ds_config = _ds_config(ON_GPU if on_gpu else ON_CPU, batch_size)
    predicted: dict[str, Predicted] = {}
    if on_gpu:
        predicted = predict_steps(recipes, ds_config, arguments.against == "open_clip", device)
    names: list[str] = []  # of the rows that what is built at once belongs to
    builds: list[Build] = []
    for name, of_name in stages.items():
        for number, (stage, share) in enumerate(of_name, start=1):
            title = stage_title(name, number, len(of_name))
            names.append(name)
            builds.append(partial(_build, title, share, stage, ds_config, batch_size, device))
    baselines = [baseline]
    if arguments.against == "open_clip":
        builds.append(partial(_build_open_clip, next(iter(recipes.values())), batch_size, device))
        baselines.append(OPEN_CLIP)
    found = take_turns(builds, arguments.rounds, device, arguments.rebuild)
    kinds_of: dict[str, list[System]] = {name: [] for name in stages}
    for name, kinds in zip(names, found, strict=False):
        kinds_of[name] += kinds
    systems = [each for name, kinds in kinds_of.items() for each in with_average(name, kinds)]
    if arguments.against == "open_clip":
        systems += found[-1]
    for system in systems:
        system.predicted = predicted.get(system.name)
    rows = [make_row(system, systems, baselines, batch_size) for system in systems]
    environment = _environment(device, batch_size, arguments, next(iter(recipes.values())))
    print(format_table(rows, baselines, environment))
    if arguments.json:
        content = {"environment": environment, "rows": [asdict(row) for row in rows]}
        write_whole(Path(arguments.json), json.dumps(content, indent=2))
    return 0


def _ds_config(values: dict, batch_size: int) -> DsConfig:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "ds_config.json"
        path.write_text(json.dumps(values))
        return read_ds_config(str(path), batch_size, 1)


@contextmanager
def _build(
    title: str,
    share: float,
    recipe: Recipe,
    ds_config: DsConfig,
    batch_size: int,
    device: torch.device,
) -> Iterator[list[System]]:
    """The kinds of step of a recipe, or of a stage that has this share of it, on one stepper."""
    print(f"building {title}", flush=True)
    stepper = Stepper(recipe, ds_config, device)
    momentum = recipe.average_momentum
    kinds = step_kinds(recipe, synthetic_batch(recipe, batch_size))

    def system(kind: StepKind) -> System:
        # As the loader hands it over.
        batch = join([kind.batch], pin=device.type == "cuda")
        flops = measure_step(recipe, kind.batch, modes=("none",), progress=kind.progress)
        return System(
            title if len(kinds) == 1 else f"{title}, {kind.name} ({kind.share:.0%})",
            lambda: stepper.step(batch, recipe.optimizer.lr, momentum, kind.progress),
            _state_bytes(stepper),
            flops.total_flops / 1e9,
            share * kind.share,
        )

    try:
        yield [system(kind) for kind in kinds]
    finally:
        stepper.engine.destroy()


@contextmanager
def _build_open_clip(
    recipe: Recipe, batch_size: int, device: torch.device
) -> Iterator[list[System]]:
    print(f"building {OPEN_CLIP}", flush=True)
    plain = OpenClipStep(recipe, batch_size, device)
    state_bytes = plain.state_bytes()
    yield [
        System(OPEN_CLIP, lambda: plain.step(0.0), state_bytes, None),
        System(f"{OPEN_CLIP}, patch dropout 0.5", lambda: plain.step(0.5), state_bytes, None),
    ]


def _state_bytes(stepper: Stepper) -> int:
    """Weights, moments, fp32 masters where the weights are not, and the teacher."""
    module, teacher = stepper.engine.module, stepper.teacher
    tensors = list(module.parameters())
    if teacher is not None:
        tensors += [*teacher.model.parameters(), *teacher.state_dict().values()]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    groups = student_groups(module, stepper.recipe.optimizer)
    kept = sum(
        optimizer_bytes(p.numel(), stepper.dtype, group["num_moments"])
        for group in groups
        for p in group["params"]
    )
    return sum(storages.values()) + kept


def _environment(device, batch_size, arguments, recipe) -> dict:
    if device.type == "cuda":
        where = {"device": torch.cuda.get_device_name(device), "time": "CUDA events, bf16"}
    else:
        where = {
            "device": f"CPU {platform.machine()}, {arguments.threads} threads",
            "time": "CPU time, fp32",
        }
    lengths = caption_lengths(batch_size, recipe.caption_tokens)
    return {
        **where,
        "batch": batch_size,
        "rounds": arguments.rounds,
        "mean caption": f"{sum(lengths) / batch_size:.1f} tokens",
        "torch": torch.__version__,
        "deepspeed": version("deepspeed"),
        "open_clip": version("open_clip_torch"),
    }
