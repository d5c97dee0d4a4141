"""Weights that are named on Hugging Face's Hub: the commit that a name stands for, and its files in
Hugging Face's cache."""

from pathlib import Path

from filelock import FileLock

from aclip.run_folder.layout import RECIPE_FILE, TEXT_FOLDER
from aclip.weights.first_look import (
    DUAL_ENCODER,
    HUGGING_FACE_CONFIG,
    HUGGING_FACE_PROCESSOR,
    OPEN_CLIP_CONFIG,
    OPEN_CLIP_WEIGHTS,
    PLAIN_WEIGHTS,
    hugging_face_type,
    some,
)
from aclip.weights.hub import HubName, in_words, is_reachable, unreachable

# The Hub's client takes half a second, and most weights are local: it is imported where it is used.


def pin(name: HubName) -> HubName:
    """The name with the commit that it stands for now, or, without a network, stood for last.

    Raises:
        ValueError: there is no such model or revision, or nobody can tell; the message ends a
            sentence.
    """
    if name.is_commit:
        return name
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError, RevisionResolutionError

    online = is_reachable()
    try:
        found = HfApi().resolve_revision(
            name.repository, revision=name.revision, local_files_only=not online
        )
    except RevisionResolutionError:
        raise ValueError(_not_cached()) from None
    except (HTTPError, OSError) as error:
        raise ValueError(in_words(error, name)) from None
    return HubName(name.repository, found.resolved)


def fetch(name: HubName) -> Path:
    """The folder in Hugging Face's cache with the files of a model that aclip reads.

    What the cache lacks is fetched, by one rank of a node while the others wait. Without a network
    the cache alone counts.

    Args:
        name: with a commit, see `pin`.

    Raises:
        ValueError: the model is not of a kind that aclip reads, or it can't be fetched; the message
            ends a sentence.
    """
    cached = _cached(name, _names_in_cache(name))
    if cached is not None:
        return cached
    if not is_reachable():
        # What another library has fetched comes without a list of what there is besides.
        folder = _snapshot(name)
        cached = _cached(name, {_relative(path, folder) for path in folder.rglob("*")})
        if cached is None:
            raise ValueError(_not_cached())
        return cached
    repository = _snapshot(name).parents[1]
    lock = repository.parent / ".locks" / repository.name / f"aclip-{name.revision}.lock"
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock):
            return _cached(name, _names_in_cache(name)) or _download(name)
    except OSError as error:
        raise ValueError(in_words(error, name)) from None


def _download(name: HubName) -> Path:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    api = HfApi()

    def download(names: list[str]) -> Path:
        folder = api.snapshot_download(
            name.repository, revision=name.revision, allow_patterns=names
        )
        return Path(folder)

    try:
        names = set(api.list_repo_files(name.repository, revision=name.revision))
        if HUGGING_FACE_CONFIG in names:
            download([HUGGING_FACE_CONFIG])
        wanted = _wanted(names, _snapshot(name))
        if not wanted:
            raise ValueError(f"holds no weights that aclip knows, but {some(sorted(names))}")
        return download(wanted)
    except HTTPError as error:
        raise ValueError(in_words(error, name)) from None


def _wanted(names: set[str], folder: Path) -> list[str]:
    """The files of a model that aclip reads, or that tell why it can't.

    Args:
        names: of all its files.
        folder: holds its config.json, if it has one.
    """
    config = {HUGGING_FACE_CONFIG} & names
    if OPEN_CLIP_CONFIG in names:
        weights = [name for name in OPEN_CLIP_WEIGHTS if name in names] or OPEN_CLIP_WEIGHTS
        return [OPEN_CLIP_CONFIG, weights[0], *config]
    model_type = hugging_face_type(folder)
    if model_type == DUAL_ENCODER:
        return [HUGGING_FACE_CONFIG, PLAIN_WEIGHTS, *({HUGGING_FACE_PROCESSOR} & names)]
    if model_type is not None:
        return [HUGGING_FACE_CONFIG]
    if {RECIPE_FILE, PLAIN_WEIGHTS} <= names:
        text = sorted(name for name in names if name.startswith(f"{TEXT_FOLDER}/"))
        return [RECIPE_FILE, PLAIN_WEIGHTS, *text]
    return []


def _cached(name: HubName, names: set[str]) -> Path | None:
    """The model's folder, if the cache holds all that is wanted of the files with these names."""
    folder = _snapshot(name)
    if HUGGING_FACE_CONFIG in names and not (folder / HUGGING_FACE_CONFIG).is_file():
        return None
    wanted = _wanted(names, folder)
    return folder if wanted and all((folder / each).is_file() for each in wanted) else None


def _names_in_cache(name: HubName) -> set[str]:
    """The names of the model's files, as the cache lists them; empty where it does not."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        files = get_cached_repo_tree(name.repository, revision=name.revision)
    except CachedRepoTreeNotFoundError:
        return set()
    return {file.path for file in files}


def _snapshot(name: HubName) -> Path:
    """Where the cache has the files of a commit."""
    from huggingface_hub import constants

    folder = f"models--{name.repository.replace('/', constants.REPO_ID_SEPARATOR)}"
    return Path(constants.HF_HUB_CACHE).expanduser() / folder / "snapshots" / name.revision


def _relative(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def _not_cached() -> str:
    return (
        f"is not in Hugging Face's cache, while {unreachable()}; fetch it where it can be (HF_HOME "
        "says where the cache is), or give a local folder"
    )
