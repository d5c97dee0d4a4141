"""Class prompts of a validation set, from clip_benchmark's text files beside the shards."""

from dataclasses import dataclass
from pathlib import Path

from aclip.errors import ConfigError

CLASS_NAMES_FILE = "classnames.txt"
TEMPLATES_FILE = "zeroshot_classification_templates.txt"
DEFAULT_TEMPLATE = "a photo of a {c}."


@dataclass(frozen=True)
class ClassPrompts:
    names_file: Path
    names: list[str]
    """By label: line i of the file is the class of `.cls` i."""
    templates: list[str]
    """Each with {c} for the class name."""

    def texts(self) -> list[str]:
        """Every class in every template, class by class: len(names) * len(templates) texts."""
        return [text.replace("{c}", name) for name in self.names for text in self.templates]


def find_class_prompts(shard: str) -> ClassPrompts | None:
    """Reads the files in the shard's folder, else in the folder above it (clip_benchmark's layout).

    Returns:
        None without a classnames.txt. Without a file of templates the one template is
        DEFAULT_TEMPLATE.

    Raises:
        ConfigError: a file is empty, a class has no name, or a template lacks {c}.
    """
    folder = Path(shard).absolute().parent
    for candidate in (folder, folder.parent):
        if (candidate / CLASS_NAMES_FILE).is_file():
            return _read(candidate / CLASS_NAMES_FILE, candidate / TEMPLATES_FILE)
    return None


def _read(names_file: Path, templates_file: Path) -> ClassPrompts:
    names = _lines(names_file)
    if "" in names:
        raise ConfigError(
            f"{names_file} has an empty line {names.index('') + 1}; give one class name a line, "
            "in the order of the labels"
        )
    if not templates_file.is_file():
        return ClassPrompts(names_file, names, [DEFAULT_TEMPLATE])
    templates = [line for line in _lines(templates_file) if line]
    for template in templates:
        if "{c}" not in template:
            raise ConfigError(
                f"{templates_file} holds the template {template!r}; write {{c}} where the class "
                "name goes"
            )
    return ClassPrompts(names_file, names, templates)


def _lines(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8").strip()
    if not text:
        raise ConfigError(f"{path} is empty; fill it or remove it")
    return [line.strip() for line in text.split("\n")]
