"""What `--suite` names: the papers' sets (catalog.yaml), the built-in scenes, and any folder."""

import difflib
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from aclip.data.demo import ensure_demo_data
from aclip.data.shards.listing import index_shards
from aclip.errors import ConfigError
from aclip.evaluation.sets.class_folders import (
    WORDNET_ID,
    class_folders,
    has_class_folders,
    name_some,
)
from aclip.evaluation.sets.evaluation_set import EvaluationSet, ShardSet
from aclip.evaluation.sets.folder_layouts import find_folder, list_tars, train_folders
from aclip.evaluation.sets.image_sets import Unavailable, Where, karpathy_set, open_torchvision
from aclip.evaluation.sets.prompts import (
    CLASS_NAMES_FILE,
    OPEN_CLIP,
    TEMPLATES_FILE,
    ClassPrompts,
    clip_benchmark_prompts,
    find_class_prompts,
    slip_prompts,
)
from aclip.evaluation.sets.task import Task, retrieval_task

PAPER, SCENES = "paper", "scenes"


@cache
def catalog() -> dict[str, dict[str, Any]]:
    """Sets by name, classification in the order of the papers' tables, then retrieval."""
    text = (resources.files("aclip.evaluation.sets") / "catalog.yaml").read_text(encoding="utf-8")
    parts = yaml.safe_load(text)
    return parts["classification"] | parts["retrieval"]


def is_retrieval(name: str) -> bool:
    return "captions" in catalog()[name]


def find_tasks(
    suite: list[str],
    data: Path | None,
    download: bool = False,
    slip_checkout: Path | None = None,
) -> tuple[list[Task], list[str]]:
    """The sets that the names mean, each opened, and a sentence for each of the suite `paper` that
    is not there.

    Args:
        suite: "paper", "scenes", names of its sets, or folders, also below `data`.
        data: the folder of the papers' sets.
        download: fetch what torchvision can.
        slip_checkout: whose prompts are taken for the papers' sets; None for clip-benchmark's.

    Raises:
        ConfigError: a name means nothing, a named set is not there or malformed, or of the suite
            `paper` nothing is there. It tells of all such names.
    """
    if data is None and any(name == PAPER or name in catalog() for name in suite):
        raise ConfigError(
            f"--suite is {' '.join(suite)}, whose sets are looked for in --data; give that folder"
        )
    where = Where(data or Path(), download)
    tasks, missing, problems = [], [], []

    def find(name: str) -> Task:
        if name in catalog():
            return _find_paper(name, where, slip_checkout)
        return _scenes() if name == SCENES else find_folder(name, _folder(name, where.data))

    for name in suite:
        for member in catalog() if name == PAPER else [name]:
            try:
                tasks.append(find(member))
            except ConfigError as error:
                is_optional = name == PAPER and isinstance(error, Unavailable)
                (missing if is_optional else problems).append(str(error))
    if problems:
        raise ConfigError("; ".join(problems))
    if not tasks:
        raise ConfigError(
            f"--data is {data}, which holds none of the {len(catalog())} sets of --suite "
            f"paper; the first of them: {missing[0]}"
        )
    return list({task.name: task for task in tasks}.values()), missing


def _folder(name: str, data: Path) -> Path:
    for folder in (Path(name), data / name):
        if folder.is_dir():
            return folder
    known = [PAPER, SCENES, *catalog()]
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f" (did you mean {nearest[0]}?)" if nearest else ""
    raise ConfigError(
        f"--suite is {name}, which is neither a folder nor a set that is known{hint}; take "
        f"{', '.join(known)}, or a folder"
    )


def _scenes() -> Task:
    demo = ensure_demo_data()
    return Task(
        SCENES,
        "built-in scenes",
        metric="top1",
        dataset=ShardSet(index_shards(demo.val)),
        source=str(demo.folder),
        prompts=find_class_prompts(demo.folder),
        train=lambda: ShardSet(index_shards(demo.train)),
    )


def _find_retrieval(name: str, where: Where) -> Task:
    entry, folder = catalog()[name], where.data / name
    shards = list_tars(folder / "test")
    if shards:
        dataset = ShardSet(index_shards(shards))
    elif (folder / entry["captions"]).is_file():
        dataset = karpathy_set(folder / entry["captions"], folder / entry["images"])
    else:
        images = folder / entry["images"]
        raise Unavailable(
            f"{name} is not in {where.data}: put Karpathy's {entry['captions']} into {folder} and "
            f"the images into {images}, or clip_benchmark's shards into {folder}/test"
        )
    return retrieval_task(name, entry["title"], dataset, folder)


def _find_paper(name: str, where: Where, slip_checkout: Path | None) -> Task:
    if is_retrieval(name):
        return _find_retrieval(name, where)
    entry, folder = catalog()[name], where.data / name
    metric = entry.get("metric", "top1")
    if list_tars(folder / "test"):
        # The order of labels is the shards' own, and so are their class files.
        return replace(find_folder(name, folder), title=entry["title"], metric=metric)
    dataset, class_names, source, train = _open_paper(name, entry, folder, where)
    prompts = _paper_prompts(name, entry, folder, slip_checkout, class_names)
    if class_names is not None and prompts.source == OPEN_CLIP:
        _check_order(class_names, source)
    if class_names is not None and len(class_names) != len(prompts.names):
        raise ConfigError(
            f"{source} has {len(class_names)} classes, but {prompts.source} names "
            f"{len(prompts.names)} for {name}; complete the folders of its classes"
        )
    return Task(
        name,
        entry["title"],
        metric=metric,
        dataset=dataset,
        source=source,
        prompts=prompts,
        train=train,
    )


def _check_order(class_names: list[str], source: str) -> None:
    """Raises:
    ConfigError: the folders are not in the order of open_clip's names, by WordNet ids.
    """
    others = [name for name in class_names if not (WORDNET_ID.fullmatch(name) or name.isdecimal())]
    if others:
        raise ConfigError(
            f"{source} holds folders that are called {name_some(others)}, but the names of the "
            "classes come in the order of WordNet ids; call the folders by these, such as "
            f"n01440764, or write {source}/{CLASS_NAMES_FILE} in the order of the folders"
        )


def _open_paper(
    name: str, entry: dict, folder: Path, where: Where
) -> tuple[EvaluationSet, list[str] | None, str, Callable | None]:
    """The test split, its own names of the classes, where it is, and what opens the other split."""
    test, train = (folder / entry.get(split, split) for split in ("test", "train"))
    if has_class_folders(test):
        # `order` places names that are sorted as text, as those of CLEVR are: 10 comes first.
        by_number = "order" not in entry.get("clip_benchmark", {})
        open_train = train_folders(train, test, by_number)
        return *class_folders(test, by_number), str(test), open_train
    layout = f"put its images into {test}/CLASS/, a folder for each class"
    if "torchvision" not in entry:
        raise Unavailable(f"{name} is not in {where.data}: {layout}")
    dataset, class_names = open_torchvision(name, entry["torchvision"], "test", where, layout)
    source = f"torchvision {entry['torchvision']['class']} in {where.data}"

    def open_train() -> EvaluationSet:
        return open_torchvision(name, entry["torchvision"], "train", where, layout)[0]

    return dataset, class_names, source, open_train


def _paper_prompts(
    name: str,
    entry: dict,
    folder: Path,
    slip_checkout: Path | None,
    class_names: list[str] | None,
) -> ClassPrompts:
    """SLIP's if a checkout is given, else those beside the data, else clip-benchmark's."""
    shipped = entry.get("clip_benchmark")
    if slip_checkout is not None:
        prompts = slip_prompts(slip_checkout, name)
    elif (prompts := find_class_prompts(folder / "test")) is not None:
        return prompts
    elif shipped is None:
        prompts = "clip-benchmark has none"
    else:
        prompts = clip_benchmark_prompts(
            shipped["templates"], shipped.get("names"), shipped.get("order"), class_names
        )
    if isinstance(prompts, ClassPrompts):
        return prompts
    raise Unavailable(
        f"{name} has no class prompts: {prompts}; write {folder}/classnames.txt and {folder}/"
        f"{TEMPLATES_FILE}, or give --slip_checkout"
    )
