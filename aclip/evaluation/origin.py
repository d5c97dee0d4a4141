"""Which model is meant, found without reading it: its place, and where its results go."""

from dataclasses import dataclass
from pathlib import Path

from aclip.config.recipe_file import load_recipe
from aclip.errors import ConfigError
from aclip.run_folder.checkpoint_folder import find_model, locate

FOLDER = "evaluation"


@dataclass(frozen=True)
class Origin:
    """A model that is evaluated.

    Attributes:
        identity: tells it from every other model: its place and state, in words.
        output: the folder of its results, where none is given.
    """

    identity: str
    output: Path


def find_origin(path: str, model: str | None, recipe_name: str | None) -> Origin:
    """Finds what `launch/evaluate.py` is given.

    Args:
        path, model, recipe_name: as `load_model` takes them.

    Raises:
        ConfigError: there is nothing, a folder without weights, no such model of the two, or no
            such recipe.
    """
    source = Path(path.removeprefix("local-dir:"))
    if locate(source) is not None:
        folder, model = find_model(str(source), model)
        folder = folder.resolve()
        output = folder.parent.parent / FOLDER / f"{folder.name}-{model}"
        return Origin(f"{model} of {folder}", output)
    if model is not None:
        raise ConfigError(
            f"--model is {model}, but {path} is no run and holds one model; leave --model out"
        )
    advice = "give a run, or a SLIP, A-CLIP or open_clip model"
    if not source.exists():
        raise ConfigError(f"the checkpoint is {path}, which does not exist; {advice}")
    files = [source] if source.is_file() else sorted(p for p in source.iterdir() if p.is_file())
    if not files:
        raise ConfigError(f"the checkpoint is {path}, a folder without any file; {advice}")
    if recipe_name is not None:
        load_recipe(recipe_name)
    size = sum(file.stat().st_size for file in files)
    newest = max(file.stat().st_mtime_ns for file in files)
    identity = f"{source.resolve()} ({size} bytes of {newest}, recipe {recipe_name})"
    name = source.resolve().name if source.is_dir() else source.stem
    return Origin(identity, Path("runs") / FOLDER / name)
