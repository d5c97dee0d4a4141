"""Checkpoints: whole fp32 tensors that any ZeRO stage and number of ranks can load.

checkpoint_folder.py says what a checkpoint's folder holds and what makes it complete.
"""

import json
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from aclip.distributed import rank, say, world_size
from aclip.engine.optimizer import ADAM
from aclip.engine.sharded_state import MASTER, ShardedState, whole_shape
from aclip.errors import ConfigError, NotWritten
from aclip.files import writing
from aclip.run_folder.checkpoint_folder import (
    OPTIMIZER,
    RNG,
    STATE,
    STUDENT,
    TEACHER,
    complete,
    prune,
    publish,
    remove_partial,
    verify,
)
from aclip.training.random_state import get_random_state, set_random_state
from aclip.training.teacher import Teacher

FAMILY, NUMBERS = "family", "numbers"
"""Keys of the optimizer's file: its state_family, and the scalars that are Python numbers, as JSON.
Its tensors are called PARAMETER/KIND; a scalar that is a tensor is called KIND alone."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; the previous one is intact."""


def save(
    root: Path,
    engine,
    teacher: Teacher | None,
    state: dict[str, Any],
    keep: int,
    keep_every: int = 0,
    spared: Collection[Path] = (),
) -> Path:
    """Writes a checkpoint and makes it the latest. A collective: every rank calls.

    Args:
        root: the run's `checkpoints` folder, shared by all ranks.
        engine: the DeepSpeed engine.
        teacher: its fp32 average is saved by rank 0.
        state: JSON-compatible progress; `samples` names the checkpoint.
        keep, keep_every, spared: which older checkpoints stay, see prune.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: on every rank, when rank 0 could not write (disk full, no permission).
        ConfigError: on every rank, when the optimizer keeps what no checkpoint can hold.
    """
    folder = root / f"samples-{state['samples']:012d}"
    partial = folder.with_suffix(".tmp")
    masters: dict[str, Tensor] = {}
    optimizer: dict[str, Tensor] = {}
    sharded = ShardedState(engine)
    for name, kind, whole in sharded.gather():
        if whole is not None:
            tensors, key = (masters, name) if kind == MASTER else (optimizer, f"{name}/{kind}")
            tensors[key] = whole
    scalars = sharded.scalars()
    numbers = {kind: value for kind, value in scalars.items() if not torch.is_tensor(value)}
    optimizer |= {kind: value for kind, value in scalars.items() if kind not in numbers}
    rng = _gather_rng()
    problem = None
    if rank() == 0:
        try:
            with writing(folder):
                remove_partial(root)
                partial.mkdir(parents=True)
                save_file(masters, partial / STUDENT)
                described = {FAMILY: sharded.family, NUMBERS: json.dumps(numbers)}
                save_file(optimizer, partial / OPTIMIZER, described)
                if teacher is not None:
                    average = {n: t.cpu().contiguous() for n, t in teacher.state_dict().items()}
                    save_file(average, partial / TEACHER)
                save_file(rng, partial / RNG)
                (partial / STATE).write_text(json.dumps(state, indent=1))
            publish(root, partial, folder)
        except (NotWritten, SafetensorError) as error:
            problem = str(error)
            # A full disk gets its room back.
            shutil.rmtree(partial, ignore_errors=True)
        else:
            _prune(root, folder, keep, keep_every, spared)
    problem = _from_rank_0(problem)
    if problem is not None:
        raise CheckpointError(f"checkpoint {folder} was not written: {problem}")
    return folder


def _prune(root: Path, newest: Path, *keeps) -> None:
    """Removes what no setting keeps; an old checkpoint that can't be removed must not end a run."""
    try:
        prune(root, newest, *keeps)
    except OSError as error:
        say(f"an older checkpoint can't be removed ({error}); the run goes on")


def read_state(folder: Path) -> dict[str, Any]:
    """The progress that was saved, after checking every file against the manifest.

    Raises:
        ConfigError: a file is missing or its content changed.
    """
    problem = _from_rank_0(verify(folder) if rank() == 0 else None)
    if problem is not None:
        others = [path.name for path in complete(folder.parent) if path != folder]
        anew = "--resume none with another --output"
        advice = f"--resume {folder.parent / others[-1]}" if others else anew
        raise ConfigError(f"checkpoint {folder} is damaged: {problem}; start with {advice}")
    return json.loads((folder / STATE).read_text())


def load(folder: Path, engine, teacher: Teacher | None, step: int) -> None:
    """Loads weights, optimizer, teacher and random state into a freshly built engine.

    Args:
        folder: a checkpoint of the same recipe shape, from any ZeRO stage and number of ranks.
        step: optimizer updates done; Adam's bias correction counts them where a checkpoint of
            earlier versions holds the moments alone.

    Raises:
        ConfigError: a parameter is missing or has another shape, or the optimizer is another.
    """
    _check_shapes(folder, engine)
    if teacher is not None and not (folder / TEACHER).is_file():
        raise ConfigError(
            f"--resume loads {folder}, which has no teacher, but the recipe has one; "
            "use the recipe of that run, or --resume none with another --output"
        )
    sharded = ShardedState(engine)
    with safe_open(folder / STUDENT, "pt") as file:
        for name in file.keys():  # noqa: SIM118 - safe_open is not a mapping
            sharded.load(name, MASTER, file.get_tensor(name))
    _load_optimizer(folder, sharded, step)
    if teacher is not None:
        teacher.load_state_dict(load_file(folder / TEACHER))
    _load_rng(folder)


def _load_optimizer(folder: Path, sharded: ShardedState, step: int) -> None:
    """Loads what was saved of the optimizer's state; what was not begins anew."""
    scalars: dict[str, Tensor | int | float] = {}
    with safe_open(folder / OPTIMIZER, "pt") as file:
        described = file.metadata() or {FAMILY: ADAM, NUMBERS: json.dumps({"step": step})}
        if described[FAMILY] != sharded.family:
            raise ConfigError(
                f"--resume loads {folder}, which was trained with {described[FAMILY]}, but this "
                f"run's optimizer is {sharded.family}; use that run's optimizer, or --resume none "
                "with another --output"
            )
        for key in file.keys():  # noqa: SIM118
            name, _, kind = key.rpartition("/")
            if name:
                sharded.load(name, kind, file.get_tensor(key))
            else:
                scalars[kind] = file.get_tensor(key)
    sharded.load_scalars(scalars | json.loads(described[NUMBERS]))


def _check_shapes(folder: Path, engine) -> None:
    built = {
        name: list(whole_shape(parameter)) for name, parameter in engine.module.named_parameters()
    }
    with safe_open(folder / STUDENT, "pt") as file:
        saved = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    for name in sorted(built.keys() | saved.keys()):
        if built.get(name) != saved.get(name):
            raise ConfigError(
                f"--resume loads {folder}, where {name} is {saved.get(name, 'absent')}, but the "
                f"recipe builds {built.get(name, 'none')}; use the recipe of that run, or --resume "
                "none with another --output"
            )


def _gather_rng() -> dict[str, Tensor]:
    """The random state of every rank; only rank 0's result is complete."""
    mine = get_random_state()
    everyone: list[Any] = [mine]
    if world_size() > 1:
        everyone = [None] * world_size()
        dist.all_gather_object(everyone, mine)
    return {f"{r}.{device}": s for r, states in enumerate(everyone) for device, s in states.items()}


def _load_rng(folder: Path) -> None:
    states = load_file(folder / RNG)
    if len({key.split(".")[0] for key in states}) != world_size():
        # No rank's stream continues on another number of ranks; only dropout ever reads it.
        return
    prefix = f"{rank()}."
    mine = {k.removeprefix(prefix): v for k, v in states.items() if k.startswith(prefix)}
    set_random_state(mine)


def _from_rank_0(value: Any) -> Any:
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
