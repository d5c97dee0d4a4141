"""Saves checkpoints while the run goes on: copied between two steps, written in a thread."""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any

from safetensors import SafetensorError

from aclip.config.sections import TrainConfig
from aclip.distributed import from_rank_0, rank, say
from aclip.engine.host_copy import HostBuffers
from aclip.engine.process_group import background_group
from aclip.errors import NotWritten
from aclip.run_folder.checkpoint_folder import prune
from aclip.training import checkpoint
from aclip.training.checkpoint import CheckpointError, Content
from aclip.training.teacher import Teacher
from aclip.training.upload import Uploader

Moment = tuple[int, list[str]]
"""What tells a checkpoint from one before: samples seen and evaluations made."""


class Saver:
    """Writes one checkpoint at a time in a thread of rank 0; every rank has one and calls it alike.

    A checkpoint counts as saved once it is published, and every rank hears of that when the next
    one is asked for. The copies that are written lie in memory that stays for the next ones.

    On CPUs the other ranks have a thread too, which sends rank 0 what they have copied, in a
    process group of its own: it may take as long as it takes.

    Args:
        root: the run's `checkpoints` folder, shared by all ranks.
        engine: the DeepSpeed engine.
        teacher: what is saved beside it.
        train: how often, how many are kept and where they are copied to.
        saved: the moment of the checkpoint that the run goes on from.

    Raises:
        ConfigError: on rank 0, if the uploads' place can't be used.
    """

    def __init__(
        self,
        root: Path,
        engine,
        teacher: Teacher | None,
        train: TrainConfig,
        saved: Moment | None = None,
    ):
        self._root = root
        self._engine = engine
        self._teacher = teacher
        self._train = train
        self._saved = saved
        self._in_flight: Moment | None = None
        self._writing: Future[str | None] | None = None
        self._buffers = HostBuffers()
        self._preparing: Future[None] | None = None
        self._group = background_group(engine.device)
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._uploader = Uploader(train.upload_to) if train.upload_to and rank() == 0 else None
        self._start_clock()

    def prepare(self) -> None:
        """Takes memory for the copies, in the thread, so that the first save is as short as others.

        To be called after the first step, which makes the optimizer's state.

        Raises:
            ConfigError: on every rank, when the optimizer keeps what no checkpoint can hold.
        """
        rooms = checkpoint.rooms(self._engine, self._teacher)
        self._preparing = self._thread.submit(self._buffers.prepare, rooms)

    def is_saved(self, moment: Moment) -> bool:
        """Whether there is a checkpoint of this moment, after the one in flight has ended.

        A collective if one is in flight.
        """
        self._end_flight()
        return self._saved == moment

    def save(
        self, state: dict[str, Any], moment: Moment, required: bool = False, uploads: bool = True
    ) -> None:
        """Copies a checkpoint and starts to write it, after the one before. A collective.

        Args:
            state: see checkpoint.gather.
            moment: what it is a checkpoint of.
            required: waits until it is published.
            uploads: whether the recipe's upload follows.

        Raises:
            CheckpointError: on every rank, if it could not be written and is `required`; otherwise
                the thread says so and the run goes on.
            ConfigError: on every rank, when the optimizer keeps what no checkpoint can hold.
        """
        self._end_flight()
        start = perf_counter()
        if self._preparing is not None:
            self._preparing.result()
        content = checkpoint.gather(self._engine, self._teacher, state, self._buffers)
        # The last one is written once more, with the evaluation that follows it.
        is_new = self._saved is None or self._saved[0] != moment[0]
        self._in_flight = moment
        self._start_clock()
        seconds = perf_counter() - start if is_new else None
        self._writing = self._thread.submit(self._write, content, required, uploads, seconds)
        if required:
            problem = self._end_flight()
            if problem is not None:
                raise CheckpointError(problem)

    def asks(self) -> bool:
        """Whether a checkpoint is due by rank 0's clock, which asks once; False on the others."""
        if rank() > 0 or monotonic() < self._due:
            return False
        self._start_clock()
        return True

    def close(self) -> None:
        """Waits for a checkpoint that is being written and for what is being uploaded."""
        self._thread.shutdown(wait=True)
        if self._uploader is not None:
            self._uploader.close()

    def _start_clock(self) -> None:
        minutes = self._train.checkpoint_minutes
        self._due = monotonic() + 60 * minutes if minutes else float("inf")

    def _end_flight(self) -> str | None:
        """Waits for the checkpoint in flight, if any; returns on every rank why there is none."""
        if self._in_flight is None:
            return None
        problem = from_rank_0(self._writing.result())
        if problem is None:
            self._saved = self._in_flight
        self._in_flight = self._writing = None
        return problem

    def _write(
        self, content: Content, required: bool, uploads: bool, copied_in: float | None
    ) -> str | None:
        """Returns why it could not be written; None if it is published, and on other ranks."""
        start = perf_counter()
        tensors = checkpoint.collect(content, self._group)
        if rank() > 0:
            return None
        try:
            folder = checkpoint.write(self._root, content, tensors)
        except (NotWritten, SafetensorError) as error:
            problem = f"checkpoint {self._root / content.name} was not written: {error}"
            if not required:
                say(f"{problem}; the run goes on, and the checkpoint before is intact")
            return problem
        if copied_in is not None:
            how = "" if required else " while the run went on"
            written_in = perf_counter() - start
            say(
                f"checkpoint {folder.name} copied in {copied_in:.2f} s, written in "
                f"{written_in:.2f} s{how}"
            )
        self._prune(folder)
        if self._uploader is not None and uploads:
            self._uploader.put(folder)
        return None

    def _prune(self, newest: Path) -> None:
        """Removes what no setting keeps; an old one that can't be removed must not end a run."""
        spared = self._uploader.unfinished if self._uploader is not None else set()
        train = self._train
        try:
            prune(self._root, newest, train.keep_checkpoints, train.keep_every, spared)
        except OSError as error:
            say(f"an older checkpoint can't be removed ({error}); the run goes on")
