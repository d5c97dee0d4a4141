"""Which model is meant, found without reading it: its place, and where its results go."""

from dataclasses import dataclass
from pathlib import Path

from aclip.config.recipe_file import load_recipe
from aclip.errors import ConfigError
from aclip.run_folder.layout import EVALUATION_FOLDER, evaluation_folder
from aclip.weights.find_named import find_named
from aclip.weights.first_look import LOCAL_DIR, find_checkpoint
from aclip.weights.hub import HUB, read_name


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
        path, model, recipe_name: as `load_model` takes them; a name of the Hub has a commit.

    Raises:
        ConfigError: there is nothing that can be weights, no such model of the two, or no such
            recipe.
    """
    try:
        found = find_named(path)
    except ValueError as error:
        advice = "" if ";" in str(error) else "; give a run, or a SLIP, A-CLIP or open_clip model"
        raise ConfigError(f"the checkpoint is {path}, which {error}{advice}") from None
    if found.kind == "checkpoint":
        folder, model = find_checkpoint(str(found.path), found.model or model)
        folder = folder.resolve()
        output = evaluation_folder(folder.parent.parent, folder.name, model)
        return Origin(f"{model} of {folder}", output)
    if model is not None:
        raise ConfigError(
            f"--model is {model}, but {path} is no run and holds one model; leave --model out"
        )
    if recipe_name is not None:
        load_recipe(recipe_name)
    if path.startswith(HUB):
        name = read_name(path).repository.replace("/", "--")
        return Origin(f"{path} (recipe {recipe_name})", Path("runs") / EVALUATION_FOLDER / name)
    source = Path(path.removeprefix(LOCAL_DIR))
    state = (found.weights or found.path).stat()
    identity = (
        f"{source.resolve()} ({state.st_size} bytes of {state.st_mtime_ns}, recipe {recipe_name})"
    )
    name = source.resolve().name if source.is_dir() else source.stem
    return Origin(identity, Path("runs") / EVALUATION_FOLDER / name)
