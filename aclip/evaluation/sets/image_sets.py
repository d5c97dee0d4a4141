"""Evaluation sets that are no shards: image files with labels or captions, and torchvision's."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from aclip.data.images.decode import DECODE_ERRORS, decode_image, to_rgb
from aclip.data.shards.listing import Skip
from aclip.distributed import say
from aclip.errors import ConfigError, DataError
from aclip.evaluation.sets.evaluation_set import MIN_SIDE, NO_LABEL, Example
from aclip.files import make_folder

if TYPE_CHECKING:
    from torchvision.datasets import VisionDataset

STORE_ERRORS = (
    *(errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ENODEV, errno.ENXIO),
    *(errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH),
)
"""What reading says where not one file but the disk or the server is at fault."""


@dataclass(frozen=True)
class Where:
    """Where the papers' sets are.

    Attributes:
        data: their folder.
        download: whether to fetch what torchvision can.
    """

    data: Path
    download: bool


class Unavailable(ConfigError):
    """A set of the papers whose images or prompts are not on this machine; says what to do."""


class FileSet:
    """Image files, each with a label or captions.

    Args:
        name: what messages call the set.
        paths: the images.
        labels: each image's label, or None.
        captions: each image's captions, or None.
        root: a folder above all of them, without which the set is gone.

    Attributes:
        notes: sentences about what was found, for reports.
    """

    def __init__(
        self,
        name: str,
        paths: list[Path],
        labels: list[int] | None = None,
        captions: list[list[str]] | None = None,
        root: Path | None = None,
    ):
        self.name = name
        self.num_samples = len(paths)
        self.notes: list[str] = []
        self._root = root
        self._paths, self._labels, self._captions = paths, labels, captions

    def read(self, rank: int, world_size: int) -> Iterator[tuple[int, Callable]]:
        for index in range(rank, self.num_samples, world_size):
            yield index, lambda index=index: self._load(index)

    def _load(self, index: int) -> Example | Skip:
        label = NO_LABEL if self._labels is None else self._labels[index]
        captions = [] if self._captions is None else self._captions[index]
        if label == NO_LABEL and not captions:
            return Skip("empty_caption")
        try:
            content = self._paths[index].read_bytes()
        except OSError as error:
            _check_store(error, self._paths[index], self._root)
            return Skip("unreadable_file")
        image = decode_image(content, MIN_SIDE)
        return image if isinstance(image, Skip) else Example(image, label, captions)


class TorchvisionSet:
    """A data set of torchvision's.

    Args:
        name: what messages call the set.
        dataset: gives (PIL image, label).
        labels: labels[c] is its label of class c; None where it counts from 0 itself.
    """

    def __init__(self, name: str, dataset: VisionDataset, labels: list[int] | None = None):
        self.name = name
        self.num_samples = len(dataset)
        self.notes: list[str] = []
        self._dataset = dataset
        self._classes = None if labels is None else {raw: c for c, raw in enumerate(labels)}

    def read(self, rank: int, world_size: int) -> Iterator[tuple[int, Callable]]:
        for index in range(rank, self.num_samples, world_size):
            yield index, lambda index=index: self._load(index)

    def _load(self, index: int) -> Example | Skip:
        try:
            image, label = self._dataset[index]
            image = to_rgb(image)
        except DECODE_ERRORS as error:
            if isinstance(error, OSError):
                _check_store(error, Path(error.filename or self.name), None)
            return Skip("unreadable_image")
        if self._classes is not None:
            label = self._classes[label]
        return Example(image, int(label), [])


def karpathy_set(file: Path, images: Path) -> FileSet:
    """The test split of a caption file in Karpathy's format.

    Args:
        file: JSON with `images`: `filename`, maybe `filepath`, `split`, `sentences` with `raw`.
        images: the folder in which filepath/filename stand.

    Raises:
        ConfigError: the file is not of that format, has no test split, or an image is missing.
    """
    try:
        entries = json.loads(file.read_bytes())["images"]  # which tells UTF-8 from UTF-16
        entries = [entry for entry in entries if entry["split"] == "test"]
        paths = [images / entry.get("filepath", "") / entry["filename"] for entry in entries]
        captions = [
            [sentence["raw"] for sentence in entry["sentences"] if sentence["raw"].strip()]
            for entry in entries
        ]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        raise ConfigError(
            f"{file} is not a caption file in Karpathy's format; give the dataset_*.json of "
            "https://cs.stanford.edu/people/karpathy/deepimagesent"
        ) from None
    if not paths:
        raise ConfigError(f"{file} has no image whose split is test; give the whole file")
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise ConfigError(
            f"{file} names {missing[0]} and {len(missing) - 1} more that are not there; put the "
            f"images into {images}"
        )
    return FileSet(str(file), paths, captions=captions, root=images)


def _check_store(error: OSError, path: Path, root: Path | None) -> None:
    """Raises:
    DataError: not one file is at fault, but what holds all of them.
    """
    if error.errno in STORE_ERRORS or (root is not None and not root.is_dir()):
        raise DataError(
            f"{path} can't be read ({error.strerror}), and not for a fault of its own; see that "
            f"{root or 'the disk or server'} can be reached, and evaluate the set again"
        ) from None


def open_torchvision(
    name: str, entry: dict[str, Any], split: str, where: Where, layout: str
) -> tuple[TorchvisionSet, list[str] | None]:
    """A split of one of torchvision's sets, and its own names of the classes by our labels.

    Args:
        name: the set's name.
        entry: its `torchvision` in catalog.yaml.
        split: test or train.
        where: the folder that torchvision reads; one of the ranks that share it downloads.
        layout: what to do otherwise, in words.

    Raises:
        Unavailable: it is not in where.data and not to be downloaded.
        ConfigError: the download failed, or a package that reads it is missing.
    """
    # Imported here: it takes seconds, which other sets need not wait for.
    import torchvision

    build = getattr(torchvision.datasets, entry["class"])
    arguments = {"root": str(where.data), **entry[split]}
    manual = entry.get("manual")
    download = where.download and manual is None
    try:
        if download:
            say(f"downloading {name} to {where.data} unless it is there")
            make_folder(where.data)
            with FileLock(where.data / f".{name}.lock"):
                dataset = build(**arguments, download=True)
        else:
            dataset = build(**arguments)
    except ImportError as error:
        raise ConfigError(
            f"{name} needs a package that is not installed ({error}); pip install -e '.[eval]' in "
            "the checkout"
        ) from None
    except (RuntimeError, OSError) as error:  # torchvision's "not found", and the network's
        if not download:
            how = f"put {manual}" if manual else "fetch it with --download"
            raise Unavailable(f"{name} is not in {where.data}: {how}, or {layout}") from None
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"{name} could not be downloaded ({reason}); try again, or {layout}"
        ) from None
    labels, class_names = entry.get("labels"), getattr(dataset, "classes", None)
    if class_names is not None and labels is not None:
        class_names = [class_names[label] for label in labels]
    return TorchvisionSet(f"torchvision {entry['class']}", dataset, labels), class_names
