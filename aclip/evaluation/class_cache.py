"""Class embeddings on disk: a model that is evaluated again does not embed its prompts again."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from aclip import distributed
from aclip.errors import NotWritten
from aclip.evaluation.sets.prompts import ClassPrompts
from aclip.evaluation.texts import embed_classes
from aclip.evaluation.towers import Progress, Towers
from aclip.files import write_whole
from aclip.models.student import Student
from aclip.weights.names import TEXT_SIDE

VERSION = 1
"""Goes up when the same weights and prompts give other embeddings."""


class ClassCache:
    """Embeds classes, or reads what the same text tower made of the same prompts before.

    Args:
        folder: where the files lie; made when needed.
        student: the model whose text tower embeds the prompts.
        not_written: hears of a file that could not be written, and the sentence about it.
    """

    def __init__(
        self,
        folder: Path,
        student: Student,
        not_written: Callable[[Path, str], None] | None = None,
    ):
        self._folder, self._not_written = folder, not_written
        digest = hashlib.sha256()
        for name, parameter in sorted(student.named_parameters()):
            if name.startswith(TEXT_SIDE):
                digest.update(f"{name} {list(parameter.shape)}".encode())
                digest.update(parameter.detach().float().cpu().contiguous().numpy())
        digest.update(student.text.identity.encode())
        self._weights = digest.hexdigest()

    def embed(
        self,
        towers: Towers,
        batch_size: int,
        prompts: ClassPrompts,
        progress: Progress | None = None,
    ) -> Tensor:
        """What `embed_classes` gives; rank 0 alone reads files, so ranks need not share a disk."""
        path = self._path(prompts)
        stored = _read(path, len(prompts.names)) if distributed.rank() == 0 else None
        width = torch.tensor([0 if stored is None else stored.shape[1]], device=towers.device)
        width = int(distributed.all_gather_rows(width).max())
        if width:
            stored = torch.zeros(0, width) if stored is None else stored
            return distributed.all_gather_rows(stored.to(towers.device))
        embeds = embed_classes(towers, batch_size, prompts, progress)
        if distributed.rank() == 0:
            try:
                write_whole(path, save({"class_embeds": embeds.cpu().contiguous()}))
            except NotWritten as error:  # costs only time, when the classes are needed again
                if self._not_written is not None:
                    self._not_written(self._folder, str(error))
        return embeds

    def _path(self, prompts: ClassPrompts) -> Path:
        what = [VERSION, self._weights, prompts.names, prompts.templates]
        return self._folder / f"{hashlib.sha256(json.dumps(what).encode()).hexdigest()}.safetensors"


def _read(path: Path, num_classes: int) -> Tensor | None:
    """(C, E) fp32, or None where there is no such file or it is not whole."""
    try:
        embeds = load_file(path)["class_embeds"]
    except (OSError, SafetensorError, KeyError):
        return None
    return embeds if embeds.ndim == 2 and len(embeds) == num_classes else None
