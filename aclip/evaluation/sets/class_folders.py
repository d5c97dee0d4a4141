"""A folder of images for each class: which folders are classes, and which files images."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from aclip.data.images.suffixes import IMAGE_SUFFIXES, is_litter
from aclip.errors import ConfigError
from aclip.evaluation.sets.image_sets import FileSet

SPLITS = frozenset(("train", "training", "val", "valid", "validation", "test", "testing", "dev"))
"""Names of folders that are no classes but parts of a set."""
NAMED = 5
"""How many classes or suffixes a sentence names."""
WORDNET_ID = re.compile(r"n\d{8}")


def list_classes(*folders: Path, by_number: bool = True) -> list[str]:
    """The class folders that any of the folders holds, in the order of their labels.

    What other tools leave there, such as .ipynb_checkpoints or __MACOSX, is no class.

    Args:
        by_number: sort by value where all names are numbers, as lists of class names do;
            otherwise as text, 10 before 2.
    """
    entries = [entry for folder in folders for entry in folder.iterdir() if entry.is_dir()]
    names = sorted({entry.name for entry in entries if not is_litter(entry.name)})
    if by_number and all(name.isdecimal() for name in names):
        names.sort(key=int)
    return names


def has_class_folders(folder: Path) -> bool:
    return folder.is_dir() and bool(list_classes(folder))


def class_folders(folder: Path, by_number: bool = True) -> tuple[FileSet, list[str]]:
    """A set with a folder of images for each class, and the folders' names by label.

    Images may lie in folders of a class's folder, and links are followed. The set's notes name the
    classes without a file, and count the files that are no images.

    Args:
        folder: holds one class folder or more.
        by_number: see list_classes.

    Raises:
        ConfigError: there is no image, a class holds other files instead, or the folders are
            splits.
    """
    class_names = list_classes(folder, by_number=by_number)
    splits = [name for name in class_names if name.lower() in SPLITS]
    if len(splits) == len(class_names):
        raise ConfigError(
            f"{folder} holds {name_some(splits)}, which are parts of a set and no classes; give "
            f"one with a folder for each class, such as {folder / splits[-1]}, or call it "
            f"{folder}/test"
        )
    paths, labels, empty, others = [], [], [], Counter()
    for label, name in enumerate(class_names):
        files = list(_files_below(folder / name))
        images = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
        no_images = [path for path in files if path.suffix.lower() not in IMAGE_SUFFIXES]
        if no_images and not images:
            raise ConfigError(
                f"{folder / name} holds no image but {count_suffixes(no_images)}; give the images "
                f"of the class {name} as one of {' '.join(sorted(IMAGE_SUFFIXES))}, or remove the "
                "folder"
            )
        if not files:
            empty.append(name)
        others.update(no_images)
        paths += images
        labels += [label] * len(images)
    if not paths:
        raise ConfigError(
            f"{folder} holds no image in a folder of its class, of which there are "
            f"{len(class_names)} ({name_some(class_names)}); write images as "
            f"{folder}/CLASS/NAME.jpg"
        )
    dataset = FileSet(str(folder), paths, labels, root=folder)
    if empty:
        dataset.notes.append(
            f"{len(empty)} of {len(class_names)} classes in {folder} have no image, but can be "
            f"answered: {name_some(empty)}"
        )
    if others:
        dataset.notes.append(
            f"left out in {folder}, because their suffix is no image's: {count_suffixes(others)}"
        )
    return dataset, class_names


def check_same_classes(train: Path, test: Path) -> None:
    """Labels are places among a split's own folders: one too few would shift those behind it.

    Raises:
        ConfigError: a class is missing in one of the splits.
    """
    for name in list_classes(train, test):
        for split, other in ((train, test), (test, train)):
            if not (split / name).is_dir():
                raise ConfigError(
                    f"--linear_probe needs the same classes in both splits, but {split} has no "
                    f"folder {name}, which {other} has; add it, or remove that one"
                )


def readable_names(class_names: list[str], where: Path) -> tuple[list[str], list[str]]:
    """What classes are called that are named by their folders, and notes about it.

    WordNet's ids are replaced by open_clip's names of ImageNet's classes.

    Args:
        class_names: the folders' names.
        where: their folder, for the messages.

    Raises:
        ConfigError: a WordNet id is none of ImageNet's 1,000, so that its name is not known.
    """
    names = [name.replace("_", " ") for name in class_names]
    advice = f"write {where}/classnames.txt, one name a line in the order of the folders"
    ids = [name for name in class_names if WORDNET_ID.fullmatch(name)]
    if ids:
        # Imported here, because each takes seconds.
        from timm.data import ImageNetInfo

        of_imagenet = sorted(ImageNetInfo().label_names())
        unknown = sorted({*ids} - {*of_imagenet})
        if unknown:
            raise ConfigError(
                f"{where} calls {len(unknown)} of its {len(names)} classes by WordNet ids that are "
                f"none of ImageNet's 1,000 ({name_some(unknown)}); {advice}"
            )
        from open_clip import IMAGENET_CLASSNAMES  # in the order of the ids

        known = dict(zip(of_imagenet, IMAGENET_CLASSNAMES, strict=True))
        note = f"{len(ids)} WordNet ids in {where} are read as open_clip's names of these classes"
        return [known.get(name, name) for name in names], [note]
    if all(name.isdecimal() for name in class_names):
        note = f"the classes in {where} are called by their numbers in the prompts; else {advice}"
        return names, [note]
    return names, []


def name_some(names: list[str]) -> str:
    rest = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {rest:,} more" if rest > 0 else "")


def count_suffixes(paths: Iterable[Path]) -> str:
    """`12 x .heic, 1 x .txt`, the most frequent first."""
    counts = Counter(path.suffix.lower() or "without a suffix" for path in paths).most_common()
    named = [f"{count:,} x {suffix}" for suffix, count in counts[:NAMED]]
    rest = sum(count for _, count in counts[NAMED:])
    return ", ".join(named + ([f"{rest:,} of other suffixes"] if rest else []))


def _files_below(folder: Path) -> Iterator[Path]:
    """The files in a folder and in its folders, sorted, without litter; each folder once, even if
    links lead back to it."""
    seen = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not is_litter(name))
        yield from (Path(place) / name for name in sorted(files) if not is_litter(name))
