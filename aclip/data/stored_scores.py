"""The teacher's scores of every sample, kept from the epoch that makes them for those that read
them: a file in the run folder for each epoch that makes them.

A file is a page of JSON that says what it is of, and behind it a record for each sample of the data
set, in the order of the shards: its codes (score_codes.py), the epoch that wrote them, and a
checksum. What was never written is a hole of zeros. All ranks write into one file, each sample's
record once an epoch, and no record counts in the epoch that wrote it. So what an epoch reads is
what was there at its beginning, also when a run that was killed goes through it again.
"""

import json
import os
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch

from aclip.data.lanes.order import Place
from aclip.data.shards.listing import Shard
from aclip.errors import DataError
from aclip.files import PlacedWriter, resize, write_whole, writing
from aclip.method.teaching import Teaching

DUE, MISSING, DAMAGED, TOO_NEW = TO_TEACH = ("due", "missing", "damaged", "too_new")
"""Why the teacher scores a sample: every sample's turn has come; or its record was never written,
does not have its checksum, or was written in this epoch, or in a later one before a kill."""
HEADER_BYTES = 4096
EPOCH_BYTES = CHECKSUM_BYTES = 4
NO_EPOCH, EVERY_EPOCH = -1, 2**62
SECONDS_BETWEEN_LOOKS = 0.01


def record_bytes(side: int) -> int:
    """The bytes of a sample's record, with `side` patches per side of the teacher view."""
    return side * side + EPOCH_BYTES + CHECKSUM_BYTES


class ScoreFiles:
    """The files of one run, in the main process and its workers.

    Args:
        folder: where they lie, shared by all ranks.
        side: S, the patches per side of the teacher view.
        num_samples: samples of the data set.
        data: what tells the data set from others.
        layers: the teacher's blocks that score, teacher.score_layers.
    """

    def __init__(
        self, folder: Path, side: int, num_samples: int, data: str, layers: int | None = None
    ):
        self.folder = folder
        self.side = side
        self.record_bytes = record_bytes(side)
        self._facts = {"side": side, "samples": num_samples, "data": data, "layers": layers}
        self._size = HEADER_BYTES + num_samples * self.record_bytes
        # The workers share its memory however they are started.
        self._readable = torch.full((), NO_EPOCH).share_memory_()

    def path(self, epoch: int) -> Path:
        """The file of the scores that were made in an epoch."""
        return self.folder / f"epoch-{epoch:05d}.scores"

    def offset(self, sample: int) -> int:
        """Where the record of a sample, by its number in the data set, begins in a file."""
        return HEADER_BYTES + sample * self.record_bytes

    def create(self, epoch: int) -> None:
        """Puts an epoch's file without records in place, also of one that is there.

        Raises:
            NotWritten: see `appearing`.
        """
        header = json.dumps({"epoch": epoch, **self._facts}).ljust(HEADER_BYTES - 1) + "\n"
        write_whole(self.path(epoch), header)
        resize(self.path(epoch), self._size)

    def mend(self, epoch: int) -> str | None:
        """Makes an epoch's file one that can be read and written; what it lacks is lost.

        Returns:
            What was wrong with it, for a sentence that begins with its path; None if nothing was.

        Raises:
            NotWritten: see `appearing`.
        """
        path, expected = self.path(epoch), {"epoch": epoch, **self._facts}
        if not os.path.lexists(path):
            self.create(epoch)
            return "is missing"
        with writing(path), open(path, "rb") as file:
            header, size = file.read(HEADER_BYTES), os.fstat(file.fileno()).st_size
        try:
            found = json.loads(header)
            differing = [name for name in expected if found[name] != expected[name]]
        except (ValueError, KeyError, TypeError):
            self.create(epoch)
            return "does not begin with what it is of"
        if differing:
            self.create(epoch)
            name = differing[0]
            return f"has the {name} {found[name]} instead of {expected[name]}"
        if size == self._size:
            return None
        resize(path, self._size)
        return f"has {size:,} bytes instead of {self._size:,}"

    def forget(self, needed: set[int]) -> None:
        """Removes the files of epochs before the last one in `needed`, but for those in it.

        Raises:
            OSError: one can't be removed.
        """
        for path in self.folder.glob(f"epoch-{'[0-9]' * 5}.scores"):
            epoch = int(path.stem.removeprefix("epoch-"))
            if epoch < max(needed, default=0) and epoch not in needed:
                path.unlink()

    def pack(self, codes: np.ndarray, epoch: int) -> bytes:
        """The record of a sample's (S, S) uint8 codes."""
        content = codes.tobytes() + epoch.to_bytes(EPOCH_BYTES, "little")
        return content + zlib.crc32(content).to_bytes(CHECKSUM_BYTES, "little")

    def unpack(self, record: bytes, epoch: int) -> tuple[np.ndarray | None, str]:
        """What a record holds for a reader in an epoch.

        Returns:
            The (S, S) uint8 codes, and ""; or None, and why there are none.
        """
        if not any(record):
            return None, MISSING
        content, checksum = record[:-CHECKSUM_BYTES], record[-CHECKSUM_BYTES:]
        if len(record) != self.record_bytes or zlib.crc32(content) != int.from_bytes(
            checksum, "little"
        ):
            return None, DAMAGED
        if int.from_bytes(content[-EPOCH_BYTES:], "little") >= epoch:
            return None, TOO_NEW
        codes = np.frombuffer(content[:-EPOCH_BYTES], dtype=np.uint8)
        return codes.reshape(self.side, self.side), ""

    def let_read(self, epoch: int = EVERY_EPOCH) -> None:
        """Tells this rank's workers that all ranks have written what the epochs before it made."""
        self._readable.fill_(epoch)

    def wait_for(self, epoch: int) -> None:
        """Waits until `let_read` has been called with this epoch or a later one."""
        while self._readable.item() < epoch:
            time.sleep(SECONDS_BETWEEN_LOOKS)


class ScoreWriter:
    """Writes records of one epoch into a file of ScoreFiles.

    Args:
        files: the run's files.
        made_in: the epoch whose file it is. epoch: the epoch that writes.

    Raises:
        NotWritten: from every method, see PlacedWriter.
    """

    def __init__(self, files: ScoreFiles, made_in: int, epoch: int):
        self._files = files
        self._epoch = epoch
        self._writer = PlacedWriter(files.path(made_in))

    def write(self, samples: np.ndarray, codes: np.ndarray) -> None:
        """Writes (n, S, S) codes of n samples, by their numbers in the data set; none below 0."""
        for sample, of_sample in zip(samples.tolist(), codes, strict=True):
            if sample >= 0:
                record = self._files.pack(of_sample, self._epoch)
                self._writer.write(record, self._files.offset(sample))

    def sync(self) -> None:
        self._writer.sync()

    def close(self) -> None:
        self._writer.close()


@dataclass(frozen=True, slots=True)
class Found:
    """What a step does about the scores of one sample: Batch's to_teach, stored_scores and
    score_place for it."""

    to_teach: str
    codes: np.ndarray | None = None
    place: np.ndarray | None = None


class ScoreReader:
    """Says which samples of a worker's next step the teacher scores, and reads those of others.

    Args:
        teaching: the run's schedule of the teacher.
        shards: the whole data set.
        files: where scores are kept; None for a run that keeps none.
    """

    def __init__(self, teaching: Teaching, shards: list[Shard], files: ScoreFiles | None):
        self._teaching = teaching
        self._files = files
        self._first = list(accumulate((shard.num_samples for shard in shards), initial=0))
        self._epoch = self._descriptor = None

    def start_step(self, step: int) -> None:
        """Prepares for the samples of a step; waits until its epoch's scores can be read."""
        teaching, epoch = self._teaching, self._teaching.epoch(step)
        self._is_due = teaching.scores_all(step)
        self._is_kept = self._files is not None and teaching.generation(epoch) is not None
        if self._is_kept and epoch != self._epoch:
            self._epoch = epoch
            self._open(None if self._is_due else teaching.generation(epoch))

    def _open(self, made_in: int | None) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        if made_in is not None:
            self._path = self._files.path(made_in)
            self._files.wait_for(self._epoch)
            # Opened anew each epoch: a network file system shows what others wrote from then on.
            with self._reading():
                self._descriptor = os.open(self._path, os.O_RDONLY)

    def find(self, place: Place) -> Found:
        """What the step does about the sample at a place.

        Raises:
            DataError: the file can't be read.
        """
        if not self._is_kept:
            nowhere = None if self._files is None else np.array(-1)
            return Found(DUE if self._is_due else "", None, nowhere)
        sample = self._first[place.shard] + place.index
        codes, to_teach = (None, DUE) if self._is_due else self._read(sample)
        is_written = codes is None and place.is_first
        return Found(to_teach, codes, np.array(sample if is_written else -1))

    def _read(self, sample: int) -> tuple[np.ndarray | None, str]:
        files = self._files
        with self._reading():
            record = os.pread(self._descriptor, files.record_bytes, files.offset(sample))
        return files.unpack(record, self._epoch)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(
                f"{self._path} can't be read ({error.strerror}); start the run again, and remove "
                "the file if that does not help: the teacher then scores its samples again"
            ) from None
