"""Checkpoints: whole fp32 tensors that any ZeRO stage and number of ranks can load.

    <run>/checkpoints/samples-000000012288/   student, optimizer, teacher, rng .safetensors;
                                              state.json; manifest.json (sizes and SHA-256)
    <run>/checkpoints/latest                  the name of the newest complete one

A checkpoint is written under a temporary name, synced and renamed, and `latest` moves last, so a
reader never sees a half one and a kill at any moment leaves the previous one in place.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from aclip.errors import ConfigError
from aclip.gather import rank, world_size
from aclip.random_state import get_random_state, set_random_state
from aclip.sharded_state import MASTER, ShardedState
from aclip.teacher import Teacher

STUDENT, OPTIMIZER, TEACHER, RNG = (
    f"{name}.safetensors" for name in ("student", "optimizer", "teacher", "rng")
)
STATE, MANIFEST, LATEST = "state.json", "manifest.json", "latest"
REPLACED = "-replaced"
_HASH_CHUNK = 1 << 22


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; the previous one is intact."""


def save(root: Path, engine, teacher: Teacher | None, state: dict[str, Any], keep: int) -> Path:
    """Writes a checkpoint and makes it the latest. A collective: every rank calls.

    Args:
        root: the run's `checkpoints` folder, shared by all ranks.
        engine: the DeepSpeed engine.
        teacher: its fp32 average is saved by rank 0.
        state: JSON-compatible progress; `samples` names the checkpoint.
        keep: how many of the newest checkpoints stay.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: on every rank, when rank 0 could not write (disk full, no permission).
    """
    folder = root / f"samples-{state['samples']:012d}"
    partial = folder.with_suffix(".tmp")
    masters: dict[str, Tensor] = {}
    moments: dict[str, Tensor] = {}
    for name, kind, whole in ShardedState(engine).gather():
        if whole is not None:
            tensors, key = (masters, name) if kind == MASTER else (moments, f"{name}/{kind}")
            tensors[key] = whole
    rng = _gather_rng()
    problem = None
    if rank() == 0:
        try:
            _remove_partial(root)
            partial.mkdir(parents=True)
            save_file(masters, partial / STUDENT)
            save_file(moments, partial / OPTIMIZER)
            if teacher is not None:
                average = {name: t.cpu().contiguous() for name, t in teacher.state_dict().items()}
                save_file(average, partial / TEACHER)
            save_file(rng, partial / RNG)
            (partial / STATE).write_text(json.dumps(state, indent=1))
            _publish(root, partial, folder)
            _prune(root, folder, keep)
        except (OSError, SafetensorError) as error:
            problem = f"{type(error).__name__}: {error}"
    problem = _from_rank_0(problem)
    if problem is not None:
        raise CheckpointError(f"checkpoint {folder} was not written: {problem}")
    return folder


def find(root: Path, resume: str) -> Path | None:
    """The checkpoint that `--resume auto|none|PATH` means; None to start new.

    Raises:
        ConfigError: PATH is neither a checkpoint nor a run folder.
    """
    if resume == "none":
        return None
    if resume == "auto":
        return _latest(root)
    path = Path(resume)
    for candidate in (path, _latest(path), _latest(path / "checkpoints")):
        if candidate is not None and (candidate / MANIFEST).is_file():
            return candidate
    raise ConfigError(
        f"--resume is {resume}, which is neither a checkpoint nor a run folder that holds one; "
        "give "
        "the folder that contains manifest.json, or auto, or none"
    )


def read_state(folder: Path) -> dict[str, Any]:
    """The progress that was saved, after checking every file against the manifest.

    Raises:
        ConfigError: a file is missing or its content changed.
    """
    problem = _from_rank_0(_verify(folder) if rank() == 0 else None)
    if problem is not None:
        others = [path.name for path in _complete(folder.parent) if path != folder]
        advice = f"--resume {folder.parent / others[-1]}" if others else "--resume none"
        raise ConfigError(f"checkpoint {folder} is damaged: {problem}; start with {advice}")
    return json.loads((folder / STATE).read_text())


def load(folder: Path, engine, teacher: Teacher | None, step: int) -> None:
    """Loads weights, optimizer, teacher and random state into a freshly built engine.

    Args:
        folder: a checkpoint of the same recipe shape, from any ZeRO stage and number of ranks.
        step: optimizer updates done, for Adam's bias correction.

    Raises:
        ConfigError: a parameter is missing or has another shape.
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
    with safe_open(folder / OPTIMIZER, "pt") as file:
        for key in file.keys():  # noqa: SIM118
            name, kind = key.rsplit("/", 1)
            sharded.load(name, kind, file.get_tensor(key))
    sharded.set_step(step)
    if teacher is not None:
        teacher.load_state_dict(load_file(folder / TEACHER))
    _load_rng(folder)


def _publish(root: Path, partial: Path, folder: Path) -> None:
    files = sorted(path.name for path in partial.iterdir())
    manifest = {
        name: {"bytes": (partial / name).stat().st_size, "sha256": _sha256(partial / name)}
        for name in files
    }
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=1))
    for name in (*files, MANIFEST):
        _sync(partial / name)
    _sync(partial)
    if folder.exists():
        # The run went on from an older checkpoint and reached this number of samples again.
        # It keeps its manifest and a name of its own until the new one is in place.
        replaced = folder.with_name(f"{folder.name}{REPLACED}")
        os.rename(folder, replaced)
        os.rename(partial, folder)
        shutil.rmtree(replaced)
    else:
        os.rename(partial, folder)
    _sync(root)
    pointer = root / f"{LATEST}.tmp"
    pointer.write_text(folder.name)
    _sync(pointer)
    os.replace(pointer, root / LATEST)
    _sync(root)


def _prune(root: Path, newest: Path, keep: int) -> None:
    older = [path for path in _complete(root) if path.name <= newest.name]
    for path in older[:-keep]:
        shutil.rmtree(path)


def _remove_partial(root: Path) -> None:
    """Removes what a killed save left behind."""
    if root.is_dir():
        for path in root.glob("samples-*.tmp"):
            shutil.rmtree(path)
        for path in root.glob(f"samples-*{REPLACED}"):
            original = path.with_name(path.name.removesuffix(REPLACED))
            if original.exists():
                shutil.rmtree(path)
            else:
                os.rename(path, original)


def _complete(root: Path) -> list[Path]:
    folders = (path for path in root.glob("samples-*") if path.suffix != ".tmp")
    return sorted(path for path in folders if (path / MANIFEST).is_file())


def _latest(root: Path) -> Path | None:
    pointer = root / LATEST
    if not pointer.is_file():
        return None
    folder = root / pointer.read_text().strip()
    if (folder / MANIFEST).is_file():
        return folder
    complete = _complete(root)
    return complete[-1] if complete else None


def _verify(folder: Path) -> str | None:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except ValueError:
        return f"{MANIFEST} is not JSON"
    for name, expected in manifest.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
        if _sha256(path) != expected["sha256"]:
            return f"{name} does not have the checksum that was saved"
    return None


def _check_shapes(folder: Path, engine) -> None:
    built = {
        name: list(getattr(parameter, "ds_shape", parameter.shape))
        for name, parameter in engine.module.named_parameters()
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


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_HASH_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
