"""Checkpoints: whole fp32 tensors that any ZeRO stage and number of ranks can load.

checkpoint_folder.py says what a checkpoint's folder holds and what makes it complete.
"""

import json
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from aclip.distributed import from_rank_0, gather_objects, rank, world_size
from aclip.engine.host_copy import HostBuffers, Room, host_copies, rooms_of_copies
from aclip.engine.optimizer import ADAM
from aclip.engine.sharded_state import MASTER, ShardedState, whole_shape
from aclip.engine.snapshot import Snapshot, rooms_of_snapshot
from aclip.errors import ConfigError, NotWritten
from aclip.files import writing
from aclip.run_folder.checkpoint_folder import (
    OPTIMIZER,
    RNG,
    STATE,
    STUDENT,
    TEACHER,
    TERMS,
    complete,
    folder_at,
    publish,
    remove_partial,
    verify,
)
from aclip.training.random_state import get_random_state, set_random_state
from aclip.training.teacher import Teacher
from aclip.training.term_state import load_terms, state_of_terms
from aclip.weights.names import LOGIT_SCALE

FAMILY, NUMBERS = "family", "numbers"
"""Keys of the optimizer's file: its state_family, and the scalars that are Python numbers, as JSON.
Its tensors are called PARAMETER/KIND; a scalar that is a tensor is called KIND alone."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; the previous one is intact."""


@dataclass(frozen=True)
class Content:
    """What a rank has of a checkpoint, in host memory of its own: training may go on.

    Attributes:
        name: its folder's.
        state: state.json.
        snapshot: the masters, and the optimizer's tensors.
        tensors: all others, by the file that they go into.
        described: what the optimizer's file says of itself.
    """

    name: str
    state: str
    snapshot: Snapshot
    tensors: dict[str, dict[str, Tensor]]
    described: dict[str, str]


def rooms(engine, teacher: Teacher | None) -> list[Room]:
    """What `gather` takes of the buffers, once the optimizer has made its state.

    Raises:
        ConfigError: see gather.
    """
    of_teacher = [] if teacher is None or rank() > 0 else rooms_of_copies(teacher.state_dict())
    return rooms_of_snapshot(ShardedState(engine)) + of_teacher


def gather(engine, teacher: Teacher | None, state: dict[str, Any], buffers: HostBuffers) -> Content:
    """Copies what a checkpoint holds into the host's memory. A collective: every rank calls.

    Args:
        engine: the DeepSpeed engine.
        teacher: its fp32 average is saved by rank 0.
        state: JSON-compatible progress; `samples` names the checkpoint.
        buffers: hold the copies of all that is large, and lose what they held before.

    Raises:
        ConfigError: on every rank, when the optimizer keeps what no checkpoint can hold.
    """
    sharded = ShardedState(engine)
    scalars = sharded.scalars()
    numbers = {kind: value for kind, value in scalars.items() if not torch.is_tensor(value)}
    # Scalars on the CPU are the optimizer's own, which the next step changes.
    optimizer = {kind: value.clone() for kind, value in scalars.items() if kind not in numbers}
    buffers.start_again()
    snapshot = Snapshot(sharded, buffers)
    files = {OPTIMIZER: optimizer, RNG: _gather_rng()}
    if teacher is not None and rank() == 0:
        files[TEACHER] = host_copies(teacher.state_dict(), buffers)
    counted = state_of_terms(engine.module.terms)
    if counted:
        files[TERMS] = {name: value.cpu().clone() for name, value in counted.items()}
    return Content(
        folder_at(Path(), state["samples"]).name,
        json.dumps(state, indent=1),
        snapshot,
        files,
        {FAMILY: sharded.family, NUMBERS: json.dumps(numbers)},
    )


def collect(content: Content, group: dist.ProcessGroup | None) -> dict[str, dict[str, Tensor]]:
    """A checkpoint's tensors by the file that they go into; on rank 0 they are whole.

    A collective of the group, in any thread; see Snapshot.collect.
    """
    masters: dict[str, Tensor] = {}
    optimizer = dict(content.tensors[OPTIMIZER])
    for (name, kind), whole in content.snapshot.collect(group).items():
        tensors, key = (masters, name) if kind == MASTER else (optimizer, f"{name}/{kind}")
        tensors[key] = whole
    return content.tensors | {STUDENT: masters, OPTIMIZER: optimizer}


def write(root: Path, content: Content, tensors: dict[str, dict[str, Tensor]]) -> Path:
    """Writes a checkpoint and makes it the latest; on rank 0, in any thread.

    Args:
        root: the run's `checkpoints` folder, shared by all ranks.
        tensors: what `collect` returned.

    Returns:
        The checkpoint's folder.

    Raises:
        NotWritten, SafetensorError: it can't be written (disk full, no permission); the one before
            is intact.
    """
    folder = root / content.name
    partial = folder.with_suffix(".tmp")
    try:
        with writing(folder):
            remove_partial(root)
            partial.mkdir(parents=True)
            for name, each in tensors.items():
                save_file(each, partial / name, content.described if name == OPTIMIZER else None)
            (partial / STATE).write_text(content.state)
        publish(root, partial, folder)
    except (NotWritten, SafetensorError):
        # A full disk gets its room back.
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return folder


def read_state(folder: Path) -> dict[str, Any]:
    """The progress that was saved, after checking every file against the manifest.

    Raises:
        ConfigError: a file is missing or its content changed.
    """
    problem = from_rank_0(verify(folder) if rank() == 0 else None)
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
    load_optimizer(folder, sharded, sharded.parameters.keys(), step)
    if teacher is not None:
        teacher.load_state_dict(load_file(folder / TEACHER))
    load_terms(folder, engine.module.terms)
    _load_rng(folder)


def load_optimizer(
    folder: Path, sharded: ShardedState, names: Collection[str], step: int = 0
) -> None:
    """Loads what was saved of the optimizer's state; what was not begins anew.

    Args:
        names: parameters whose saved state is loaded; that of all others becomes zeros.
        step: see load.

    Raises:
        ConfigError: the optimizer is another.
    """
    scalars: dict[str, Tensor | int | float] = {}
    with safe_open(folder / OPTIMIZER, "pt") as file:
        described = file.metadata() or {FAMILY: ADAM, NUMBERS: json.dumps({"step": step})}
        if described[FAMILY] != sharded.family:
            raise ConfigError(
                f"--resume loads {folder}, which was trained with {described[FAMILY]}, but this "
                f"run's optimizer is {sharded.family}; use that run's optimizer, or --resume none "
                "with another --output"
            )
        kinds: dict[str, list[str]] = {}
        for key in file.keys():  # noqa: SIM118
            name, _, kind = key.rpartition("/")
            if not name:
                scalars[kind] = file.get_tensor(key)
                continue
            kinds.setdefault(name, []).append(kind)
            if name in names:
                sharded.load(name, kind, file.get_tensor(key))
    # Parameters that are new in a stage, or were locked before it, have no saved state and get
    # zeros, of the kinds that the optimizer keeps of their like: of any saved matrix (Muon), or of
    # the logit scale, which every run trains and which is no matrix.
    matrices = sharded.orthogonal()
    matrix_kinds = next((kinds[name] for name in sorted(matrices & kinds.keys())), ())
    for name in sharded.parameters.keys() - (kinds.keys() & names):
        like = matrix_kinds if name in matrices else kinds.get(LOGIT_SCALE, ())
        for kind in kinds.get(name, like):
            sharded.load(name, kind, torch.zeros(whole_shape(sharded.parameters[name])))
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
    """The random state of every rank, by rank and device."""
    states_of_ranks = enumerate(gather_objects(get_random_state()))
    return {f"{r}.{device}": s for r, states in states_of_ranks for device, s in states.items()}


def _load_rng(folder: Path) -> None:
    states = load_file(folder / RNG)
    if len({key.split(".")[0] for key in states}) != world_size():
        # No rank's stream continues on another number of ranks; only dropout ever reads it.
        return
    prefix = f"{rank()}."
    mine = {k.removeprefix(prefix): v for k, v in states.items() if k.startswith(prefix)}
    set_random_state(mine)
