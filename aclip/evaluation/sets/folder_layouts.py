"""A folder as an evaluation set, recognised by what lies in it: shards in clip_benchmark's layout,
captions in Karpathy's format, or a folder for each class."""

from collections.abc import Callable
from pathlib import Path

from aclip.data.images.suffixes import is_litter
from aclip.data.shards.listing import index_shards
from aclip.errors import ConfigError
from aclip.evaluation.sets.class_folders import (
    check_same_classes,
    class_folders,
    count_suffixes,
    has_class_folders,
    list_classes,
    name_some,
    readable_names,
)
from aclip.evaluation.sets.evaluation_set import EvaluationSet, ShardSet
from aclip.evaluation.sets.image_sets import karpathy_set
from aclip.evaluation.sets.prompts import (
    TEMPLATES_FILE,
    ClassPrompts,
    find_class_prompts,
    read_templates,
)
from aclip.evaluation.sets.task import RETRIEVAL, Task, retrieval_task

DATASET_TYPE_FILE = "dataset_type.txt"


def find_folder(name: str, folder: Path) -> Task:
    """The set in a folder.

    Args:
        name: what the command line calls the folder.

    Raises:
        ConfigError: the folder has no known layout, or what is in it is malformed.
    """
    for find in (_shards, _captions, _classes):
        task = find(name, folder.name or name, folder)
        if task is not None:
            return task
    raise ConfigError(
        f"--suite is {name}, a folder of no known layout ({_found(folder)}); write images as "
        f"{folder}/test/CLASS/NAME.jpg, or WebDataset shards as {folder}/test/0.tar with "
        f"{folder}/classnames.txt"
    )


def _found(folder: Path) -> str:
    """What lies in a folder, in words."""
    files = [path for path in folder.iterdir() if not path.is_dir()]
    folders = list_classes(folder)
    parts = [f"folders {name_some(folders)}"] if folders else []
    parts += [f"files {count_suffixes(files)}"] if files else []
    return f"it holds {' and '.join(parts)}" if parts else "it is empty"


def list_tars(folder: Path) -> list[str]:
    """The tars in a folder, by number where their names are numbers."""
    if not folder.is_dir():
        return []
    tars = (
        path
        for path in folder.iterdir()
        if path.suffix.lower() == ".tar" and path.is_file() and not is_litter(path.name)
    )
    return sorted(map(str, tars), key=_by_number)


def train_folders(
    folder: Path, test: Path, by_number: bool = True
) -> Callable[[], EvaluationSet] | None:
    """What opens the training split of the test split in `test`; None where there is none."""
    if not has_class_folders(folder):
        return None

    def open_train() -> EvaluationSet:
        check_same_classes(folder, test)
        return class_folders(folder, by_number)[0]

    return open_train


def _shards(name: str, title: str, folder: Path) -> Task | None:
    shards = list_tars(folder / "test") or list_tars(folder)
    if not shards:
        return None
    kind_file = folder / DATASET_TYPE_FILE
    if kind_file.is_file() and kind_file.read_text(errors="replace").strip().lower() == RETRIEVAL:
        dataset = ShardSet(index_shards(shards))
        return retrieval_task(name, title, dataset, folder)
    train = list_tars(folder / "train")
    return Task(
        name,
        title,
        metric="top1",
        dataset=ShardSet(index_shards(shards)),
        source=str(folder),
        prompts=find_class_prompts(folder),
        train=(lambda: ShardSet(index_shards(train))) if train else None,
    )


def _captions(name: str, title: str, folder: Path) -> Task | None:
    files = list(folder.glob("dataset_*.json"))
    if len(files) != 1:
        return None
    return retrieval_task(name, title, karpathy_set(files[0], folder), folder)


def _classes(name: str, title: str, folder: Path) -> Task | None:
    """The class folders of `test`, or without that folder those of the folder itself."""
    has_splits = has_class_folders(folder / "test")
    test = folder / "test" if has_splits else folder
    if not has_class_folders(test):
        return None
    dataset, class_names = class_folders(test)
    prompts = find_class_prompts(test)
    if prompts is None:
        names, notes = readable_names(class_names, test)
        dataset.notes += notes
        templates = read_templates(folder / TEMPLATES_FILE)
        prompts = ClassPrompts(f"the folders of {test}", [[name] for name in names], templates)
    if len(prompts.names) != len(class_names):
        raise ConfigError(
            f"{test} has {len(class_names)} folders of classes, but {prompts.source} names "
            f"{len(prompts.names)}; give one name a line in the order of the folders, by value "
            "where all are numbers"
        )
    return Task(
        name,
        title,
        metric="top1",
        dataset=dataset,
        source=str(test),
        prompts=prompts,
        train=train_folders(folder / "train", test) if has_splits else None,
    )


def _by_number(path: str) -> tuple[int, str]:
    stem = Path(path).stem
    return (int(stem) if stem.isdigit() else 0, stem)
