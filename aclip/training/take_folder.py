"""The run folder as a start finds it: taken over, and what of it goes on. Rank 0 alone looks."""

import json
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from aclip.config.arguments import DEMO
from aclip.config.continuing import (
    NEVER_CHANGE,
    ds_config_changes,
    key_of,
    may_change,
    recipe_changes,
)
from aclip.config.ds_config import DsConfig
from aclip.config.recipe import Recipe
from aclip.config.recipe_file import load_recipe, stages_of
from aclip.config.text_folder import text_changes
from aclip.distributed import say
from aclip.errors import ConfigError, NotWritten
from aclip.files import check_writable
from aclip.lock import PATIENCE_VARIABLE, claim
from aclip.run_folder import checkpoint_folder
from aclip.run_folder.layout import (
    CHECKPOINTS_FOLDER,
    DS_CONFIG_FILE,
    METRICS_FILE,
    PICTURES_FOLDER,
    RECIPE_FILE,
    SCORES_FOLDER,
    START_FILE,
    TENSORBOARD_FOLDER,
    TEXT_FOLDER,
    latest_record,
    record_before,
)
from aclip.training.stage import evaluation_at, is_stage_done, stage_number, stage_to_begin
from aclip.weights.find_named import begun_init, pinned_init

AUTO, NONE = "auto", "none"


@dataclass(frozen=True)
class Beginning:
    """Where a start begins. JSON-compatible, as rank 0 hands it to the others.

    Attributes:
        checkpoint: the checkpoint's folder; None for a new run.
        word: what --resume said when the folder's run began: auto, none, or a path in full.
        is_first: whether the folder's run begins now, so that nothing in it goes on.
        is_rewind: whether the run goes back to an older checkpoint of its own.
        is_complete: whether the run was complete before.
        stage: the number of the stage that the run begins or goes on in.
        begun: samples and steps of the run when that stage begins, by their names.
        begins_stage: whether the checkpoint is the end of the stage before.
        crops: data.crops of a run that goes on; None for a new run, or if nothing tells.
        init: model.init with the commit that a name of the Hub stood for when the run began; None
            where the recipe's stays as it is.
    """

    checkpoint: str | None
    word: str
    is_first: bool = False
    is_rewind: bool = False
    is_complete: bool = False
    stage: int = 1
    begun: dict[str, int] = field(default_factory=lambda: {"samples": 0, "steps": 0})
    begins_stage: bool = False
    crops: str | None = None
    init: str | None = None

    @property
    def record(self) -> dict | None:
        """What start.json says of a start that begins something; None for one that goes on."""
        if not self.is_first and not self.is_rewind:
            return None
        return {"resume": self.word, "checkpoint": self.checkpoint}


def take_folder(
    run_folder: Path, resume: str, recipe: Recipe, ds_config: DsConfig, allow_changes: bool
) -> dict:
    """Takes the run folder over; returns the Beginning as a dict.

    Raises:
        ConfigError: see `own_folder`, `find_beginning` and `check_changes`.
    """
    own_folder(run_folder)
    beginning = find_beginning(run_folder, resume)
    if beginning.checkpoint is None:
        return asdict(replace(beginning, init=pinned_init(recipe.model.init)))
    stages = stages_of(recipe)
    progress = checkpoint_folder.read_progress(Path(beginning.checkpoint))
    number = 1 if progress is None else stage_number(progress)
    if number > len(stages):
        raise ConfigError(
            f"the recipe has {len(stages)} stages, but {beginning.checkpoint} is of stage {number} "
            "of its run; give the stages of that run, or use --resume none with another --output"
        )
    if beginning.is_first:
        if recipe.model.init:
            say(f"--resume is {resume}, so that model.init {recipe.model.init} is not read")
        is_done = progress is not None and is_stage_done(stages[number - 1], progress)
    else:
        recorded = _recorded_recipe(run_folder, beginning)
        if recorded is not None:
            beginning = replace(beginning, init=begun_init(recipe.model.init, recorded.model.init))
            recipe = with_init(recipe, beginning.init)
        if recipe.data.crops is None:
            crops = None if recorded is None else recorded.data.crops
            beginning = replace(beginning, crops=crops)
            data = recipe.data.model_copy(update={"crops": crops})
            recipe = recipe.model_copy(update={"data": data})
        stages = stages_of(recipe)
        is_done = check_changes(run_folder, beginning, stages[number - 1], ds_config, allow_changes)
    if progress is not None:
        # Of another run's stage, only what it trained counts.
        is_evaluated = beginning.is_first or not is_evaluation_missing(stages[number - 1], progress)
        found = stage_to_begin(progress, is_done, len(stages), is_evaluated)
        if beginning.is_first:  # the checkpoint is another run's: this folder holds nothing yet
            found |= {"is_complete": False}
        beginning = replace(beginning, **found)
    return asdict(beginning)


def is_evaluation_missing(recipe: Recipe, progress: dict) -> bool:
    """Whether a run was killed between the last checkpoint of a stage and its evaluation."""
    is_due = bool(recipe.data.val) or recipe.data.train == DEMO
    return is_due and evaluation_at(progress["samples"]) not in progress.get("evaluations", {})


def find_beginning(run_folder: Path, resume: str) -> Beginning:
    """What `--resume auto|none|PATH` means in this folder.

    A run that has checkpoints goes on from its latest one, whatever it was begun from, if --resume
    says that again, so that the same command always continues. A path to one of its older
    checkpoints takes it back there, once.

    Raises:
        ConfigError: there is no such checkpoint, or the folder holds another run already.
    """
    root = run_folder / CHECKPOINTS_FOLDER
    latest = checkpoint_folder.find(root, AUTO)
    word = resume if resume in (AUTO, NONE) else str(Path(resume).resolve())
    if latest is None:
        found = checkpoint_folder.find(root, resume)
        return Beginning(None if found is None else str(found), word, is_first=True)
    begun = _begun_from(run_folder)
    on = Beginning(str(latest), begun)
    if word == AUTO or Path(word) in (run_folder.resolve(), root.resolve()):
        return on
    if word == begun:
        say(f"--resume is {resume}, as when the run in {run_folder} began, so the run goes on")
        return on
    holds = f"--resume is {resume}, but --output is {run_folder}, which holds a run"
    advice = "give another --output, or leave --resume out to continue that run"
    if word == NONE:
        raise ConfigError(f"{holds} already (its latest checkpoint is {latest.name}); {advice}")
    found = checkpoint_folder.find(root, resume)
    if not checkpoint_folder.lies_in(root, found):
        raise ConfigError(f"{holds} that did not begin there; {advice}")
    return Beginning(str(found), word, is_rewind=True)


def check_changes(
    run_folder: Path, beginning: Beginning, recipe: Recipe, ds_config: DsConfig, allowed: bool
) -> bool:
    """Refuses to continue a run with other settings, unless that is `allowed`; returns whether the
    checkpoint's stage is complete.

    Args:
        recipe: of the checkpoint's stage, now.

    Raises:
        ConfigError: names each key that differs, or the record that can't be read.
    """
    progress = checkpoint_folder.read_progress(Path(beginning.checkpoint))
    if progress is None:
        return False  # a damaged checkpoint is named when all of it is verified
    recorded = record_before(run_folder, RECIPE_FILE, progress["samples"])
    if not recorded.is_file():
        say(f"{recorded} is missing, so nobody knows whether the settings are those of the run")
        return False
    changes_of_text = list(text_changes(recipe.model.text, run_folder / TEXT_FOLDER))
    try:
        then = load_recipe(str(recorded))
        changes = recipe_changes(then, recipe) + changes_of_text
        recorded = record_before(run_folder, DS_CONFIG_FILE, progress["samples"])
        changes += ds_config_changes(_read_object(recorded), ds_config.values)
    except (OSError, ValueError) as error:
        unread = f"{recorded}, which says what the run was trained with, can't be read ({error})"
        if allowed:
            say(f"{unread}; the settings are not compared")
            return False
        raise ConfigError(
            f"{unread}; put it back, or add --allow_changes to continue without comparing"
        ) from None
    size = progress["data"]["samples"]
    steps, steps_then = recipe.num_steps(size), then.num_steps(size)
    is_complete = progress["step"] >= steps_then
    is_over = is_complete and progress["step"] >= steps
    # Where a stage is over, its data are not compared with the checkpoint's any more.
    checked_later = frozenset() if is_over and recipe.stages else NEVER_CHANGE
    asked = [each for each in changes if not may_change(each)]
    counts = [each for each in asked if key_of(each) not in checked_later]
    listed = ", ".join(asked)
    if counts and is_over and not recipe.stages:
        raise ConfigError(
            f"--output is {run_folder}, which holds a complete run with other settings (then -> "
            f"now): {listed}; nothing would be trained with these, so give another --output, or "
            "the settings of that run"
        )
    if allowed and recipe.model.init and "model.init" in map(key_of, counts):
        raise ConfigError(
            f"model.init is {recipe.model.init!r}, but the run in {run_folder} continues from its "
            "own checkpoint, so that no other weights would be read; give another --output"
        )
    if counts and not allowed:
        raise ConfigError(
            f"--output is {run_folder}, whose run was trained with other settings (then -> now): "
            f"{listed}; give another --output to train anew, set them back, or add --allow_changes "
            "to continue with them"
        )
    if counts:
        say(f"the run continues with other settings (then -> now): {listed}")
    elif changes and is_complete and not recipe.stages:
        say(f"the run is complete, so these have no effect (then -> now): {', '.join(changes)}")
    return is_over


def with_init(recipe: Recipe, init: str | None) -> Recipe:
    """The recipe with another model.init; itself with None."""
    if init is None:
        return recipe
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"init": init})})


def _recorded_recipe(run_folder: Path, beginning: Beginning) -> Recipe | None:
    """What the checkpoint that a run goes on from was trained with; None where nothing tells."""
    progress = checkpoint_folder.read_progress(Path(beginning.checkpoint))
    if progress is None:
        return None
    try:
        return load_recipe(str(record_before(run_folder, RECIPE_FILE, progress["samples"])))
    except (OSError, ValueError):
        return None


def _begun_from(run_folder: Path) -> str:
    """What --resume said when the folder's run began; auto where nothing tells."""
    try:
        return str(json.loads(latest_record(run_folder, START_FILE).read_text())["resume"])
    except (OSError, ValueError, KeyError, TypeError):
        return AUTO


def _read_object(path: Path) -> dict:
    values = json.loads(path.read_text())
    if not isinstance(values, dict):
        raise ConfigError("it holds no JSON object")
    return values


def own_folder(run_folder: Path) -> None:
    """Makes this process the folder's owner, and checks that what lies in it can be written.

    Raises:
        ConfigError: another run owns it, also after the patience of who restarts runs; or a part of
            it can't be written.
    """
    check_writable(run_folder, "--output")
    try:
        patience = float(os.environ.get(PATIENCE_VARIABLE) or 0)
    except ValueError:
        raise ConfigError(
            f"{PATIENCE_VARIABLE} is {os.environ[PATIENCE_VARIABLE]}; give seconds, or unset it"
        ) from None
    try:
        note = claim(run_folder, "--output", "a run")
    except NotWritten as error:
        raise ConfigError(str(error)) from None  # no other start would find it writable
    except ConfigError as error:
        if not patience:
            raise
        # A process of the start before may take a while to end, or its node to be given up.
        say(f"{error}; this start waits for that, at most {patience:g} s")
        note = claim(run_folder, "--output", "a run", patience)
    if note is not None:
        say(note)
    for name in (CHECKPOINTS_FOLDER, TENSORBOARD_FOLDER, PICTURES_FOLDER, SCORES_FOLDER):
        if os.path.lexists(run_folder / name):
            check_writable(run_folder / name, f"{name} of --output")
    metrics = run_folder / METRICS_FILE
    if metrics.exists() and not (metrics.is_file() and os.access(metrics, os.R_OK | os.W_OK)):
        raise ConfigError(
            f"--output is {run_folder}, where {METRICS_FILE} is no file that can be written; "
            "remove it, or give another folder"
        )
