"""What a step of a ViT-B/16 asks of the host: operations to launch, and waits for the device.

Both are counted on the CPU with the real number of layers and narrow ones, since neither depends on
the width. On a GPU each operation is at least one launch, and each wait leaves it idle.
"""

import json
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from torch.utils._python_dispatch import TorchDispatchMode

from aclip.config.ds_config import read_ds_config
from aclip.config.recipe_file import load_recipe
from aclip.data.batch import Batch, join
from aclip.data.stored_scores import MISSING, ScoreFiles
from aclip.data.synthetic import synthetic_batch
from aclip.engine.process_group import init_distributed
from aclip.method.tokens import Tokens
from aclip.planning.engine_operations import engine_operations
from aclip.planning.trace_step import trace_step
from aclip.planning.zero_memory import zero_settings
from aclip.training.score_keeper import ScoreKeeper
from aclip.training.stepper import Stepper

pytestmark = pytest.mark.distributed
ROOT = Path(__file__).parents[2]
NARROW = [
    "model.image.kwargs={embed_dim: 24, num_heads: 2}",
    "model.text={width: 16, heads: 2, layers: 12}",
    "model.embed_dim=8",
    "loss.simclr_widths=[16, 16, 8]",
    "loss.byol_widths=[16, 8]",
    "train.global_batch_size=4",
]
VIEWS = {
    "view", "_unsafe_view", "t", "transpose", "permute", "expand", "slice", "select", "unsqueeze",
    "squeeze", "detach", "alias", "narrow", "split", "split_with_sizes", "unbind", "as_strided",
    "unfold", "diagonal",
}  # fmt: skip
"""Operations that launch nothing."""


class Operations(TorchDispatchMode):
    """Counts the operations that compute something, by the phase in which they come."""

    def __init__(self):
        super().__init__()
        self.phase = "rest"
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ not in VIEWS:
            self.counts[self.phase] += 1
        return function(*args, **(kwargs or {}))

    def in_phase(self, name, function):
        def run(*args, **options):
            before, self.phase = self.phase, name
            try:
                return function(*args, **options)
            finally:
                self.phase = before

        return run


def build(ds_values: dict | str, ranks: int, folder: Path, overrides=()):
    """The stepper of a narrow aclip_vitb16 and its batch, after two steps."""
    device = init_distributed()
    path = folder / "ds.json"
    if isinstance(ds_values, str):
        path = ROOT / "ds_configs" / ds_values
    else:
        path.write_text(json.dumps(ds_values))
    recipe = load_recipe("aclip_vitb16", [*NARROW, *overrides])
    stepper = Stepper(recipe, read_ds_config(str(path), 4, ranks), device)
    batch = join([synthetic_batch(recipe, 4 // ranks)], pin=False)
    for _ in range(2):
        stepper.step(batch, 1e-3, 0.99)
    return stepper, batch


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_step_launches_few_operations(run_distributed, tmp_path, ranks):
    def count():
        stepper, batch = build("zero2.json", ranks, tmp_path)
        operations = Operations()
        engine, teacher = stepper.engine, stepper.teacher
        engine.step = operations.in_phase("update", engine.step)
        teacher.update = operations.in_phase("update", teacher.update)
        with operations:
            stepper.step(batch, 1e-3, 0.99)
            stepper.gradient_norm()
        return dict(operations.counts)

    predicted = predicted_launches(ranks)
    for counts in run_distributed(count, ranks):
        assert 0 < counts["update"] <= 50, counts
        assert 1000 < sum(counts.values()) <= 2600, counts
        # What a plan says that the step launches.
        assert sum(counts.values()) == pytest.approx(predicted, rel=0.1)


def predicted_launches(ranks: int) -> int:
    recipe = load_recipe("aclip_vitb16", NARROW)
    ds_config = read_ds_config(str(ROOT / "ds_configs" / "zero2.json"), 4, ranks)
    trace = trace_step(recipe, synthetic_batch(recipe, 4 // ranks), ranks)
    engine = engine_operations(trace.trained, zero_settings(ds_config, ranks))
    return sum(each.times for each in trace.operations + engine)


class Waits(Operations):
    """Notes each moment in which the host would wait for the device."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []
        self.on_device = True

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        reads = ("_local_scalar_dense", "nonzero", "masked_select")
        if self.on_device and function.overloadpacket.__name__ in reads:
            self.found.append(str(function))
        return super().__torch_dispatch__(function, types, args, kwargs)

    def noting(self, name, function):
        def call(*args, **options):
            self.found.append(name)
            return function(*args, **options)

        return call

    def on_the_host(self, function):
        def call(*args):
            self.on_device = False
            try:
                return function(*args)
            finally:
                self.on_device = True

        return call


class StandInStream:
    """A stream of a device that works behind the host's back."""

    def __init__(self):
        self.waited_for = []

    def wait_stream(self, other):
        self.waited_for.append(other)


@pytest.fixture
def device_that_runs_behind(monkeypatch):
    """Lets DeepSpeed take the CPU for a device with streams; gives the stream of the steps."""
    current = StandInStream()
    methods = {
        "is_synchronized_device": lambda self: False,
        "resolves_data_dependency": lambda self: False,
        "use_host_timers": lambda self: True,
        "Stream": property(lambda self: StandInStream),
        "current_stream": lambda self, index=None: current,
    }
    for name, method in methods.items():
        monkeypatch.setattr(CPU_Accelerator, name, method)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)
    return current


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_host_waits_for_nothing_in_a_step(
    run_distributed, tmp_path, device_that_runs_behind, ranks
):
    """Neither in aclip nor in DeepSpeed. A run waits for one event, of the step before."""

    def find():
        stepper, batch = build("zero2.json", ranks, tmp_path)
        device_that_runs_behind.waited_for.clear()
        found = waits_of_step(stepper, batch)
        last = device_that_runs_behind.waited_for[-1]
        return found, last is stepper.engine.optimizer.reduction_stream

    assert run_distributed(find, ranks) == [([], True)] * ranks


def waits_of_step(stepper: Stepper, batch: Batch, after=lambda: None) -> list[str]:
    """What the host waits for in a step, and in what is called after it."""
    waits, patch, make = Waits(), pytest.MonkeyPatch(), torch.tensor
    for name in ("tolist", "cpu", "numpy"):
        patch.setattr(torch.Tensor, name, waits.noting(name, getattr(torch.Tensor, name)))
    stop = waits.noting("synchronize", lambda self, index=None: None)
    patch.setattr(CPU_Accelerator, "synchronize", stop)
    copies = waits.noting("torch.tensor(..., device=...)", make)
    patch.setattr(torch, "tensor", lambda *a, **o: (copies if o.get("device") else make)(*a, **o))
    # On a GPU the tokens are located while they are on the host.
    patch.setattr(Tokens, "located", waits.on_the_host(Tokens.located))
    with waits:
        stepper.step(batch, 1e-3, 0.99)
        stepper.gradient_norm()
        after()
    patch.undo()
    return waits.found


def test_the_host_waits_for_nothing_where_scores_are_kept_or_read(
    run_distributed, tmp_path, device_that_runs_behind
):
    """Nor where some samples lack theirs; and the step that reads does not run the teacher."""
    overrides = ["loss.byol=0", "loss.simclr=0", "teacher.reuse=2", "mask.warmup=0.1"]

    def find():
        stepper, scored = build("zero2.json", 1, tmp_path, overrides)
        keeper = ScoreKeeper(stepper.recipe.teaching(8), ScoreFiles(tmp_path / "scores", 14, 8, ""))
        stored = torch.full((4, 14, 14), 100, dtype=torch.uint8)
        stored[1] = 0
        place = torch.arange(4)
        blind = replace(scored, teacher_view=None, to_teach=[""] * 4, score_place=place - 4)
        scored = replace(scored, score_place=place)
        mixed = replace(scored, to_teach=["", MISSING, "", ""], stored_scores=stored)
        read = replace(blind, stored_scores=stored.clamp(min=1))
        seen = []
        for batch in (scored, mixed, read):
            with mock.patch.object(
                stepper.teacher, "forward", wraps=stepper.teacher.forward
            ) as ran:
                found = waits_of_step(stepper, batch, partial(put, keeper, stepper, batch))
            seen.append((found, ran.call_count, len(stepper.coded)))
        return seen

    assert run_distributed(find, 1) == [[([], 1, 1), ([], 1, 1), ([], 0, 0)]]


def put(keeper: ScoreKeeper, stepper: Stepper, batch: Batch) -> None:
    """What the trainer does with the scores of a step."""
    keeper.put(9, batch.to_teach, stepper.coded)


def test_zero_3_plans_ahead_from_step_to_step(run_distributed, tmp_path):
    """Its trace of what is gathered when stays valid, so that it gathers before it is asked to."""
    values = json.loads((ROOT / "ds_configs" / "zero3.json").read_text())
    values["zero_optimization"]["stage3_param_persistence_threshold"] = 100

    def count():
        stepper, batch = build(values, 2, tmp_path)
        coordinator = type(stepper.engine.optimizer.parameter_offload.get_param_coordinator())
        invalidated, invalidate = [], coordinator._invalidate_trace
        coordinator._invalidate_trace = lambda self: (invalidated.append(1), invalidate(self))
        for _ in range(3):
            stepper.step(batch, 1e-3, 0.99)
        complete = stepper.engine.optimizer.parameter_offload.get_param_coordinator()
        return len(invalidated), complete.is_complete_trace()

    assert run_distributed(count, 2) == [(0, True)] * 2
