"""The runs of an ablation: a case with a seed, its folder, and what lies in it."""

import json
from dataclasses import dataclass
from pathlib import Path

from aclip.ablation.cases import Case
from aclip.config.continuing import key_of, may_change, recipe_changes
from aclip.config.recipe import Recipe
from aclip.config.recipe_file import recipe_of_values
from aclip.errors import ConfigError
from aclip.files import write_whole

STATE_FILE, LOG_FILE = "ablation.json", "log.txt"
CLAIM_FILE = ".ablation"
"""The lock of the ablation that trains a run; the run itself has its own."""
CONTENT = "content"
"""The key, beside the data's counts, of digests of what lies in the shards; some may be unknown."""
PLACES = {"data.train", "data.sources.shards", "text.word_counts"}
"""Keys that may differ where a run goes on on another machine; the data are compared by what lies
in them."""


@dataclass(frozen=True)
class Run:
    """A case with a seed.

    Attributes:
        folder: its run folder.
        settings: all that its result depends on.
        may_diverge: whether a loss that is not finite is a result, not a failure.
    """

    case: Case
    seed: int
    folder: Path
    settings: dict
    may_diverge: bool = False

    @property
    def is_finished(self) -> bool:
        return self._state().get("finished", False)

    @property
    def has_diverged(self) -> bool:
        """Whether it ended since its loss was not finite."""
        return self._state().get("diverged", False)

    def check(self) -> None:
        """Raises ConfigError if the folder holds anything else than a run with these settings."""
        if not (self.folder / STATE_FILE).exists() and not self._holds_other_files():
            return
        then = self._state().get("settings", {})
        changes = ["it holds no run"]
        if then:
            before, now = (_recipe_of(each, self.folder) for each in (then, self.settings))
            changes = [
                change
                for change in recipe_changes(before, now)
                if not may_change(change) and key_of(change).removeprefix("stages.") not in PLACES
            ]
            changes += _changes_of_data(then.get("data", {}), self.settings["data"])
            if then.get("ds_config") != self.settings["ds_config"]:
                changes.append(f"ds_config {then.get('ds_config')} -> {self.settings['ds_config']}")
        if changes:
            raise ConfigError(
                f"--output holds {self.folder}, which was trained with other settings (then -> "
                f"now: {', '.join(changes)}); give another --output, or the settings that it was "
                "started with"
            )

    def _holds_other_files(self) -> bool:
        """Whether there is more in the folder than a start leaves that has not noted its settings
        yet: its claim, and that note as far as it is written."""
        entries = self.folder.iterdir() if self.folder.is_dir() else ()
        return any(
            entry.name != CLAIM_FILE and not entry.match(f"{STATE_FILE}.*.tmp") for entry in entries
        )

    def note(self, finished: bool, diverged: bool = False) -> None:
        state = {"settings": self.settings, "finished": finished}
        if diverged:
            state["diverged"] = True
        write_whole(self.folder / STATE_FILE, json.dumps(state, indent=1).encode())

    def _state(self) -> dict:
        path = self.folder / STATE_FILE
        try:
            return dict(json.loads(path.read_text())) if path.is_file() else {}
        except (ValueError, TypeError):
            raise ConfigError(f"{path} is damaged; remove {self.folder}") from None


def make_runs(
    cases: list[Case], seeds: int, output: Path, ds_values: dict, data: dict
) -> list[Run]:
    """Every case with seed 0, then with seed 1, and so on: a stopped ablation has equally many
    seeds of every row.

    Args:
        seeds: their number; they are 0, ..., seeds - 1.
        ds_values: the ds_config's content.
        data: what identifies the shards.
    """
    return [
        make_run(case, seed, output / f"{case.name}-seed{seed}", ds_values, data)
        for seed in range(seeds)
        for case in cases
    ]


def make_run(
    case: Case, seed: int, folder: Path, ds_values: dict, data: dict, may_diverge: bool = False
) -> Run:
    """The case with a seed; see Run and make_runs."""
    recipe = case.recipe.model_dump(mode="json")
    recipe["train"]["seed"] = seed
    settings = {"recipe": recipe, "ds_config": ds_values, "data": data}
    return Run(case, seed, folder, settings, may_diverge)


def _recipe_of(settings: dict, folder: Path) -> Recipe:
    try:
        return recipe_of_values(settings["recipe"], f"{folder / STATE_FILE}")
    except (ConfigError, KeyError) as error:
        raise ConfigError(f"{folder / STATE_FILE} is damaged ({error}); remove {folder}") from None


def _changes_of_data(then: dict, now: dict) -> list[str]:
    """What differs between the data of two runs. A digest counts where both have one: an earlier
    version noted none, and remote shards have no marks."""
    counts = [{key: each[key] for key in each if key != CONTENT} for each in (then, now)]
    if counts[0] != counts[1]:
        return [f"data {counts[0]} -> {counts[1]}"]
    return [
        f"data.{split}, whose shards hold other samples"
        for split, digests in now.get(CONTENT, {}).items()
        if any(
            None not in (before, digests[kind]) and before != digests[kind]
            for kind, before in then.get(CONTENT, {}).get(split, {}).items()
        )
    ]
