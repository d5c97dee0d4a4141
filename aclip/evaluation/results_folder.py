"""The folder of a model's results: results.json and results.md, written anew after every set."""

import json
from pathlib import Path
from typing import Any

from aclip.data.captions import NOTE_KINDS
from aclip.distributed import say
from aclip.errors import ConfigError, NotWritten
from aclip.evaluation.results import Row, make_rows, markdown, to_json
from aclip.evaluation.sets.task import Task
from aclip.evaluation.skips import show_kinds, skipped_kinds
from aclip.files import write_whole
from aclip.run_folder.layout import RESULTS_FILE as JSON

MARKDOWN = "results.md"


class ResultsFolder:
    """Holds results of one model; those of an earlier evaluation of the same model stay.

    Args:
        folder: can be written, and is this process's alone.
        identity: tells the model from every other one.

    Attributes:
        entries: each set's result as results.json holds it; the earlier ones come first.
        failed: why a set, or its probe, has no result, by its name.
        unwritten: why a file could not be written, by its path.

    Raises:
        ConfigError: the folder holds results of another model.
    """

    def __init__(self, folder: Path, identity: str):
        self._folder, self._identity = folder, identity
        self.entries: dict[str, dict[str, Any]] = self._read()
        self.failed: dict[str, str] = {}
        self.unwritten: dict[Path, str] = {}

    @property
    def paths(self) -> list[Path]:
        """The files."""
        return [self._folder / JSON, self._folder / MARKDOWN]

    def add(self, task: Task, metrics: dict[str, float]) -> str:
        """Takes in a set's result, in place of an earlier one; returns what there is to say."""
        entry = {
            "title": task.title,
            "metric": task.metric,
            "source": task.source,
            "prompts": None if task.prompts is None else task.prompts.source,
            "notes": task.dataset.notes,
            "metrics": metrics,
        }
        replaced = "\nit takes the place of an earlier result" if task.name in self.entries else ""
        self.entries[task.name] = entry
        return "\n".join(_facts(entry)) + replaced

    def rows(self, published: str, only: str | None = None) -> list[Row]:
        """The table's lines, of all sets or of one."""
        tasks = [
            (Task(name, entry["title"], entry["metric"], None, "", None), entry["metrics"])
            for name, entry in self.entries.items()
            if only in (None, name)
        ]
        return make_rows(tasks, published)

    def write(self, facts: dict[str, Any], published: str) -> None:
        """Writes both files; a failure is said, and costs the file.

        Args:
            facts: what results.json holds besides: the model in words and so on.
            published: the row of the paper that is set beside ours.
        """
        values = {**facts, "identity": self._identity, "published": published}
        values |= {"sets": self.entries, "failed": self.failed}
        lines = [fact for entry in self.entries.values() for fact in _facts(entry)]
        lines += [f"not evaluated: {name}: {why}" for name, why in self.failed.items()]
        lines += [f"left out: {sentence}" for sentence in facts["left_out"]]
        heading = f"Evaluation of the {facts['model']}"
        self._write(JSON, to_json(values))
        self._write(MARKDOWN, markdown(heading, self.rows(published), published, lines))

    def not_written(self, path: Path, sentence: str) -> None:
        """Says once that a file could not be written, and remembers it."""
        if path not in self.unwritten:
            say(f"{sentence}; the evaluation goes on")
        self.unwritten[path] = sentence

    def _write(self, name: str, content: str) -> None:
        path = self._folder / name
        try:
            write_whole(path, content)
        except NotWritten as error:
            self.not_written(path, str(error))
        else:
            self.unwritten.pop(path, None)

    def _read(self) -> dict[str, dict[str, Any]]:
        """The results that are there.

        Raises:
            ConfigError: they are another model's.
        """
        path = self._folder / JSON
        if not path.exists():
            return {}
        try:
            values = json.loads(path.read_bytes())
            model = str(values["model"])
            if values.get("identity") == self._identity:
                return {name: _checked(entry) for name, entry in values["sets"].items()}
            found = f"results of the {model}, which are not to be replaced by another model's"
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            found = "something else than results of an evaluation"
        raise ConfigError(
            f"--output is {self._folder}, whose {JSON} holds {found}; give another folder, or move "
            "the file away"
        )


def _facts(entry: dict[str, Any]) -> list[str]:
    """A sentence about a set's images, and those about what was found."""
    metrics = entry["metrics"]
    kinds = skipped_kinds(metrics)
    words = (
        f"{entry['title']}: {metrics['num_images']:,.0f} images of {entry['source']}, "
        f"{metrics['num_skipped']:,.0f} unusable" + (f" ({show_kinds(kinds)})" if kinds else "")
    )
    words += "".join(
        f", {kind} {metrics[f'num_{kind}']:,.0f}" for kind in NOTE_KINDS if f"num_{kind}" in metrics
    )
    if entry["prompts"] is not None:
        words += f"; prompts: {entry['prompts']}"
    return [words, *(f"{entry['title']}: {note}" for note in entry["notes"])]


def _checked(entry: dict[str, Any]) -> dict[str, Any]:
    """The entry of an earlier results.json, if it has what is shown of it."""
    _facts(entry), entry["metric"]
    return entry
