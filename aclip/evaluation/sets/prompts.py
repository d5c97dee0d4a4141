"""What a class is called in front of the text tower: class names and templates, and who says so."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from aclip.data.captions import NOTE_KINDS, decode_text
from aclip.distributed import say
from aclip.errors import ConfigError

CLASS_NAMES_FILE = "classnames.txt"
TEMPLATES_FILE = "zeroshot_classification_templates.txt"
DEFAULT_TEMPLATE = "a photo of a {c}."
OPEN_CLIP = "open_clip, 7 templates"
"""The source of ImageNet's prompts."""


@dataclass(frozen=True)
class ClassPrompts:
    source: str
    """Who named the classes, for messages and reports."""
    names: list[list[str]]
    """What each class is called, by label: one name or several."""
    templates: list[str]
    """Each with {c} for the class name."""

    def texts(self, label: int) -> list[str]:
        """A class in every template, under each of its names."""
        return [text.replace("{c}", name) for text in self.templates for name in self.names[label]]

    def num_texts(self, label: int) -> int:
        return len(self.templates) * len(self.names[label])


def find_class_prompts(folder: Path) -> ClassPrompts | None:
    """Reads the files in a folder, else in the folder above it (clip_benchmark's layout).

    Returns:
        None without a classnames.txt. Without a file of templates the one template is
        DEFAULT_TEMPLATE.

    Raises:
        ConfigError: a file is empty, a class has no name, or a template lacks {c}.
    """
    folder = folder.absolute()
    for candidate in (folder, folder.parent):
        if (candidate / CLASS_NAMES_FILE).is_file():
            return _read(candidate / CLASS_NAMES_FILE, candidate / TEMPLATES_FILE)
    return None


def read_templates(path: Path) -> list[str]:
    """The lines of a file of templates; DEFAULT_TEMPLATE where there is none.

    Raises:
        ConfigError: the file is empty, or a template lacks {c}.
    """
    if not path.is_file():
        return [DEFAULT_TEMPLATE]
    templates = [line for line in _lines(path) if line]
    for template in templates:
        if "{c}" not in template:
            raise ConfigError(
                f"{path} holds the template {template!r}; write {{c}} where the class name goes"
            )
    return templates


def clip_benchmark_prompts(
    templates_key: str,
    names_key: str | None,
    order: list[int] | None,
    class_names: list[str] | None,
) -> ClassPrompts | str:
    """The prompts that the package clip-benchmark ships, and open_clip's for ImageNet.

    Args:
        templates_key: the set's key in its templates, or "imagenet", see `_imagenet`.
        names_key: the set's key in its class names; None where it has none.
        order: order[label] is the place of a label's name in that list; None for as they are.
        class_names: what the data set itself calls its classes, taken where names_key is None.

    Returns:
        The prompts, or what they lack, in words.

    Raises:
        ConfigError: the package is not installed.
    """
    if templates_key == "imagenet":
        return _imagenet()
    templates = _shipped("en_zeroshot_classification_templates.json").get(templates_key)
    if templates is None:
        return "clip-benchmark has no templates for it"
    if names_key is not None:
        names = _shipped("en_classnames.json")[names_key]
        if order is not None:
            names = [names[place] for place in order]
        source = "clip-benchmark"
    elif class_names is not None:
        names = [name.replace("_", " ") for name in class_names]
        source = "clip-benchmark's templates, the data set's class names"
    else:
        return "clip-benchmark has no class names for it"
    return ClassPrompts(source, [[name] for name in names], templates)


def slip_prompts(checkout: Path, name: str) -> ClassPrompts | str:
    """The prompts in a checkout of facebookresearch/SLIP, which the papers evaluated with.

    Args:
        checkout: holds labels.json and templates.json.
        name: what the checkout calls the set.

    Returns:
        The prompts, or what they lack, in words.

    Raises:
        ConfigError: the files are missing or not SLIP's.
    """
    labels, templates = (_read_slip(checkout / f"{kind}.json") for kind in ("labels", "templates"))
    if name not in labels or name not in templates:
        return f"{checkout} has no labels and templates for it"
    names = [label if isinstance(label, list) else [label] for label in labels[name]]
    texts = [template.replace("{}", "{c}") for template in templates[name]]
    return ClassPrompts(f"SLIP ({checkout})", names, texts)


def _imagenet() -> ClassPrompts:
    from open_clip import IMAGENET_CLASSNAMES, SIMPLE_IMAGENET_TEMPLATES

    templates: list[Callable[[str], str]] = SIMPLE_IMAGENET_TEMPLATES
    return ClassPrompts(
        OPEN_CLIP,
        [[name] for name in IMAGENET_CLASSNAMES],
        [template("{c}") for template in templates],
    )


def _shipped(file: str) -> dict:
    try:
        folder = resources.files("clip_benchmark") / "datasets"
    except ModuleNotFoundError:
        raise ConfigError(
            "the class prompts of --suite come from the package clip-benchmark, which is not "
            "installed; pip install -e '.[eval]' in the checkout, or give --slip_checkout"
        ) from None
    return json.loads((folder / file).read_text(encoding="utf-8"))


def _read_slip(path: Path) -> dict:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not JSON"
        raise ConfigError(
            f"--slip_checkout needs {path}, which can't be read ({reason}); give a checkout of "
            "https://github.com/facebookresearch/SLIP"
        ) from None
    if not isinstance(values, dict) or not all(isinstance(v, list) for v in values.values()):
        raise ConfigError(
            f"--slip_checkout needs {path}, which does not hold a list for each data set; give a "
            "checkout of https://github.com/facebookresearch/SLIP"
        )
    return values


def _read(names_file: Path, templates_file: Path) -> ClassPrompts:
    names = [[name] for name in _lines(names_file)]
    if [""] in names:
        raise ConfigError(
            f"{names_file} has an empty line {names.index(['']) + 1}; give one class name a line, "
            "in the order of the labels"
        )
    return ClassPrompts(str(names_file), names, read_templates(templates_file))


def _lines(path: Path) -> list[str]:
    text, note = decode_text(path.read_bytes())
    if note is not None:
        say(f"{path}: {NOTE_KINDS[note]}")
    text = text.rstrip()  # a first line that is blank is a class without a name
    if not text:
        raise ConfigError(f"{path} is empty; fill it or remove it")
    return [line.strip() for line in text.split("\n")]
