"""Keeps what the teacher scores for the epochs that read it: what the ranks do together for that.

A rank writes a step's scores one step late, when they are on the host, so that no step waits.
Before an epoch reads them, all ranks have written theirs.
"""

from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from aclip.config.geometry import teacher_grid
from aclip.config.recipe import Recipe
from aclip.data.stored_scores import (
    DAMAGED,
    EVERY_EPOCH,
    MISSING,
    TO_TEACH,
    ScoreFiles,
    ScoreWriter,
)
from aclip.distributed import from_rank_0, gather_objects, rank, say
from aclip.errors import NotWritten
from aclip.method.teaching import Teaching
from aclip.run_folder import checkpoint_folder
from aclip.run_folder.layout import SCORES_FOLDER
from aclip.training.stage import FIRST_STAGE, StagePlace


class ScoreKeeper:
    """One rank's part in keeping scores; without `files` it does nothing.

    Args:
        teaching: the run's schedule of the teacher.
        files: the run's files, which this rank's data workers read too; None for none.
        first_sample: samples that the run has seen when its stage begins.
    """

    def __init__(self, teaching: Teaching, files: ScoreFiles | None, first_sample: int = 0):
        self._first_sample = first_sample
        self.files = files
        self._teaching = teaching
        self._epoch: int | None = None
        self._writer: ScoreWriter | None = None
        self._pending: list[tuple[Tensor, Tensor]] = []
        self._copied: torch.cuda.Event | None = None
        self._of_epoch: Counter[str] = Counter()
        self._taught_since_line, self._samples_since_line = 0, 0

    def begins(self, step: int) -> bool:
        """Whether `begin` has to be called before this step: its epoch keeps or reads scores, and
        has not been begun by this process."""
        if self.files is None:
            return False
        epoch = self._teaching.epoch(step)
        return epoch != self._epoch and self._teaching.generation(epoch) is not None

    def begin(self, step: int) -> None:
        """Begins the epoch of a step: from here on its scores can be read. A collective.

        Raises:
            NotWritten: on every rank, if one can't write what the epoch before made, or if the
                epoch's file can't be made.
        """
        try:
            self.end_epoch()
            problem = None
        except NotWritten as error:
            problem = str(error)
        # Once this is through, all ranks have written.
        problem = next(filter(None, gather_objects(problem)), None)
        if problem is None:
            problem = from_rank_0(self._prepare(step) if rank() == 0 else None)
        if problem is not None:
            raise NotWritten(problem)
        self._epoch = self._teaching.epoch(step)
        self.files.let_read(self._epoch)

    def _prepare(self, step: int) -> str | None:
        """Sees to the epoch's file; returns why that failed."""
        epoch = self._teaching.epoch(step)
        made_in = self._teaching.generation(epoch)
        try:
            if made_in == epoch and step == self._teaching.first_step(epoch):
                self.files.create(epoch)
            elif (fault := self.files.mend(made_in)) is not None:
                say(
                    f"{self.files.path(made_in)} {fault}; the teacher scores the samples again "
                    "whose scores are lost"
                )
        except NotWritten as error:
            return str(error)
        return None

    def put(self, step: int, to_teach: list[str], coded: list[tuple[Tensor, Tensor]]) -> list[int]:
        """Starts to copy what the teacher has scored in a step to the host, without waiting.

        Args:
            to_teach: Batch.to_teach of the step's batch.
            coded: Stepper.coded after the step.

        Returns:
            What is counted of the step on this rank, for `settle` once it is added over the ranks.
        """
        if self.files is None:
            return []
        if self._teaching.generation(self._teaching.epoch(step)) is not None:
            self._pending = [(places, self._to_host(codes)) for places, codes in coded]
        kinds = Counter(to_teach)
        return [len(to_teach), *(kinds[kind] for kind in TO_TEACH)]

    def _to_host(self, codes: Tensor) -> Tensor:
        if not codes.is_cuda:
            return codes
        on_host = torch.empty(codes.shape, dtype=codes.dtype, pin_memory=True)
        on_host.copy_(codes, non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record()
        return on_host

    def settle(self, counts: list[int]) -> None:
        """Writes what was put, and takes its counts, added over the ranks.

        Raises:
            NotWritten: the disk is full, for example.
        """
        if self.files is None:
            return
        num_samples, *of_kinds = counts
        self._samples_since_line += num_samples
        self._taught_since_line += sum(of_kinds)
        self._of_epoch.update(dict(zip(TO_TEACH, of_kinds, strict=True)))
        if self._copied is not None:
            self._copied.synchronize()
        for places, codes in self._pending:
            if self._writer is None:
                made_in = self._teaching.generation(self._epoch)
                self._writer = ScoreWriter(self.files, made_in, self._epoch)
            self._writer.write(places.numpy(), codes.numpy())
        self._pending, self._copied = [], None

    def sync(self) -> None:
        """Makes what was written last; a checkpoint counts on it.

        Raises:
            NotWritten: see `settle`.
        """
        if self._writer is not None:
            self._writer.sync()

    def end_epoch(self) -> None:
        """Ends what this rank wrote in an epoch, and says what the epoch had lacked.

        Raises:
            NotWritten: see `settle`.
        """
        if self._writer is not None:
            self._writer.sync()
            self._writer.close()
            self._writer = None
        found, self._of_epoch = self._of_epoch, Counter()
        if self._epoch is None or self._teaching.generation(self._epoch) == self._epoch:
            return
        made_in = self._teaching.generation(self._epoch)
        missing, damaged = found[MISSING], found[DAMAGED]
        if damaged or missing > self._teaching.left_over(self._epoch):
            say(
                f"{self.files.path(made_in)} lacked scores that epoch {self._epoch} was to read "
                f"({missing:,} not written, {damaged:,} damaged); the teacher has scored these "
                "samples again"
            )

    def take_share(self) -> float | None:
        """The share of the samples since the last call that the teacher has scored."""
        taken, num = self._taught_since_line, self._samples_since_line
        self._taught_since_line = self._samples_since_line = 0
        return taken / num if num else None

    def forget(self, checkpoints: Path, step: int) -> None:
        """Removes files that neither the step's epoch nor a checkpoint of the run needs."""
        if self.files is None or rank() > 0:
            return
        batch_size = self._teaching.batch_size
        saved = [checkpoint_folder.num_samples(f) for f in checkpoint_folder.complete(checkpoints)]
        of_stage = [samples - self._first_sample for samples in saved]
        following = [step + 1, *(n // batch_size + 1 for n in of_stage if n >= 0)]
        needed = {self._teaching.generation(self._teaching.epoch(each)) for each in following}
        self._forget_all_but(needed - {None})

    def end_stage(self) -> None:
        """Removes the stage's files, which no later stage reads; behind its last checkpoint."""
        if self.files is not None and rank() == 0:
            self._forget_all_but({EVERY_EPOCH})

    def _forget_all_but(self, needed: set[int]) -> None:
        try:
            self.files.forget(needed)
        except OSError as error:
            say(f"older scores can't be removed ({error}); the run goes on")


def build_score_keeper(
    recipe: Recipe, teaching: Teaching, run_folder: Path, data: str, place: StagePlace = FIRST_STAGE
) -> ScoreKeeper:
    """The keeper of a run's stage.

    Args:
        data: what tells the run's data set from others.
    """
    if not recipe.keeps_scores:
        return ScoreKeeper(teaching, None)
    folder = run_folder / SCORES_FOLDER
    if place.number > 1:  # whose epochs are counted anew
        folder /= f"stage-{place.number}"
    layers = recipe.teacher.score_layers
    files = ScoreFiles(folder, teacher_grid(recipe), teaching.num_samples, data, layers)
    return ScoreKeeper(teaching, files, place.samples)
