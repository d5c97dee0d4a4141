"""The checkpoints folder on disk: complete or absent, found, verified, replaced and pruned.

    checkpoints/samples-000000012288/   student, optimizer, teacher, terms and rng .safetensors,
                                        state.json, manifest.json with their sizes and SHA-256
    checkpoints/latest                  the name of the newest complete one

A checkpoint is written under a temporary name, synced and renamed, and `latest` moves last, so a
reader never sees a half one and a kill at any moment leaves the previous one in place.
A folder of any other name, such as a copy `samples-000000012288-best`, is the user's: it can be
resumed from, and is never removed.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection
from pathlib import Path

from aclip.errors import ConfigError
from aclip.files import remove_leftovers, share, sync, write_whole, writing
from aclip.run_folder.layout import CHECKPOINTS_FOLDER

STUDENT, OPTIMIZER, TEACHER, TERMS, RNG = (
    f"{name}.safetensors" for name in ("student", "optimizer", "teacher", "terms", "rng")
)
STATE = "state.json"
MANIFEST, LATEST = "manifest.json", "latest"
REPLACED = "-replaced"
PREFIX = "samples-"
_OWN = re.compile(rf"{PREFIX}\d{{12}}")
_HASH_CHUNK = 1 << 22


def find(root: Path, resume: str) -> Path | None:
    """The checkpoint that `--resume auto|none|PATH` means; None to start new.

    Raises:
        ConfigError: PATH is neither a checkpoint nor a run folder.
    """
    if resume == "none":
        return None
    if resume == "auto":
        return _latest(root)
    found = locate(Path(resume))
    if found is not None:
        return found
    raise ConfigError(
        f"--resume is {resume}, which is neither a checkpoint nor a run folder that holds one; "
        "give the folder that contains manifest.json, or auto, or none"
    )


def locate(path: Path) -> Path | None:
    """The checkpoint that a path means: itself, or the latest of a checkpoints or run folder."""
    for candidate in (path, _latest(path), _latest(path / CHECKPOINTS_FOLDER)):
        if candidate is not None and (candidate / MANIFEST).is_file():
            return candidate
    return None


def lies_in(root: Path, folder: Path) -> bool:
    """Whether a checkpoint is one of a run's own, and not another run's."""
    return folder.resolve().parent == root.resolve()


def publish(root: Path, partial: Path, folder: Path) -> None:
    """Gives a written checkpoint its manifest and its name, and makes it the latest.

    Raises:
        NotWritten: the disk is full, or the folder can't be written.
    """
    with writing(folder):
        _give_name(root, partial, folder)
    make_latest(root, folder)


def _give_name(root: Path, partial: Path, folder: Path) -> None:
    files = sorted(path.name for path in partial.iterdir())
    manifest = {
        name: {"bytes": (partial / name).stat().st_size, "sha256": _sha256(partial / name)}
        for name in files
    }
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=1))
    for name in (*files, MANIFEST):
        share(partial / name)
        sync(partial / name)
    sync(partial)
    if folder.exists():
        # The run went on from an older checkpoint and reached this number of samples again.
        # It keeps its manifest and a name of its own until the new one is in place.
        replaced = folder.with_name(f"{folder.name}{REPLACED}")
        os.rename(folder, replaced)
        os.rename(partial, folder)
        _remove(replaced)
    else:
        os.rename(partial, folder)
    sync(root)


def prune(root: Path, newest: Path, keep: int, keep_every: int = 0, spared: Collection[Path] = ()):
    """Removes checkpoints up to `newest` that nothing keeps.

    Args:
        keep: how many of the newest stay.
        keep_every: the first checkpoint at or after each multiple of so many samples stays too; 0
            for none.
        spared: folders that stay this time.
    """
    # A link leads to where the user has moved a checkpoint.
    ours = [path for path in complete(root) if not path.is_symlink()]
    older = [path for path in ours if path.name <= newest.name]
    kept = {*older[-keep:], *spared, *(_milestones(older, keep_every) if keep_every else ())}
    for path in older:
        if path not in kept:
            shutil.rmtree(path)


def _milestones(folders: list[Path], every: int) -> list[Path]:
    """The first folder in each span of `every` samples but the one that begins at 0."""
    spans: dict[int, Path] = {}
    for folder in folders:
        spans.setdefault(num_samples(folder) // every, folder)
    return [folder for span, folder in spans.items() if span > 0]


def num_samples(folder: Path) -> int:
    """The samples that a checkpoint's name gives."""
    return int(folder.name.removeprefix(PREFIX))


def folder_at(root: Path, samples: int) -> Path:
    """Where the checkpoint at so many samples lies."""
    return root / f"{PREFIX}{samples:012d}"


def remove_partial(root: Path) -> None:
    """Removes what a killed save left behind."""
    if root.is_dir():
        remove_leftovers(root)
        for path in _own(root, ".tmp"):
            shutil.rmtree(path)
        for path in _own(root, REPLACED):
            original = path.with_name(path.name.removesuffix(REPLACED))
            if original.exists():
                _remove(path)
            else:
                os.rename(path, original)


def complete(root: Path) -> list[Path]:
    """The complete checkpoints of a folder, oldest first."""
    return _complete(root, "")


def _complete(root: Path, suffix: str) -> list[Path]:
    return sorted(path for path in _own(root, suffix) if (path / MANIFEST).is_file())


def _own(root: Path, suffix: str) -> list[Path]:
    """What bears a checkpoint's name and the suffix; a name that a user has made is none."""
    named = root.glob(f"{PREFIX}*{suffix}")
    return [path for path in named if _OWN.fullmatch(path.name.removesuffix(suffix))]


def _remove(folder: Path) -> None:
    """Removes a checkpoint, or a user's link to where it lies now."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder)


def read_progress(folder: Path) -> dict | None:
    """A checkpoint's state.json, unverified; None for one that is damaged."""
    try:
        progress = json.loads((folder / STATE).read_text())
    except (OSError, ValueError):
        return None
    is_whole = isinstance(progress, dict) and {"samples", "step", "data"} <= progress.keys()
    return progress if is_whole else None


def make_latest(root: Path, folder: Path) -> None:
    """Makes a checkpoint of `root` the one that the run goes on from."""
    write_whole(root / LATEST, folder.name)


def _latest(root: Path) -> Path | None:
    pointer = root / LATEST
    if not pointer.is_file():
        return None
    folder = root / pointer.read_text().strip()
    if (folder / MANIFEST).is_file():
        return folder
    # A kill may have left one under the name that it had while it was replaced.
    folders = sorted([*complete(root), *_complete(root, REPLACED)])
    return folders[-1] if folders else None


def verify(folder: Path, names: list[str] | None = None) -> str | None:
    """What differs from the manifest, in words; None when nothing does.

    Args:
        names: the files to check; None for all.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except ValueError:
        return f"{MANIFEST} is not JSON"
    for name in manifest if names is None else names:
        expected = manifest.get(name)
        if expected is None:
            return f"{MANIFEST} does not list {name}"
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
        if _sha256(path) != expected["sha256"]:
            return f"{name} does not have the checksum that was saved"
    return None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_HASH_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
