"""The training loop: batches in, steps, and what is due between two of them."""

import signal
from pathlib import Path

import torch
from torch import Tensor

from aclip.data.batch import Batch
from aclip.data.fingerprint import SHARD_LIST, check_progress, fingerprint
from aclip.data.loader import build_train_loader
from aclip.data.shards.listing import Shard
from aclip.distributed import all_gather_rows, rank, world_size
from aclip.evaluation.during_training import Evaluator
from aclip.run_folder.checkpoint_folder import lies_in
from aclip.run_folder.layout import CHECKPOINTS_FOLDER
from aclip.run_folder.metrics_file import EvaluationLine, StepLine
from aclip.training import checkpoint
from aclip.training.evaluated_models import evaluated_models, mask_teacher
from aclip.training.metrics.host_bound import HostBound
from aclip.training.metrics.loading_notice import LoadingNotice
from aclip.training.metrics.metrics_logger import MetricsLogger, peak_memory_gib
from aclip.training.metrics.sample_counts import SampleCounts
from aclip.training.metrics.step_timer import StepTimer
from aclip.training.metrics.wandb_tracker import WandbTracker
from aclip.training.run_schedule import RunSchedule
from aclip.training.saver import Moment, Saver
from aclip.training.score_keeper import build_score_keeper
from aclip.training.stage import Stage, evaluation_at
from aclip.training.step_watch import StepWatch, WatchedStep
from aclip.training.stepper import Stepper
from aclip.training.watchdog import COMPUTING, EVALUATING, LOADING, SAVING, Watchdog

GRADIENT_NORM, LOGIT_SCALE = "gradient_norm", "logit_scale"
"""What is watched and logged beside the terms."""


class Trainer:
    """Trains a stage, in most runs the only one, from its data to its last sample.

    Args:
        stage: what to train, on what.
        run_folder: where checkpoints and metrics go.
        resume_from: a checkpoint folder, or None to start new.
        device: this rank's device.
        begins_stage: whether `resume_from` is the end of the stage before.
        evaluator: see during_training.py; None for no evaluation.
        watchdog: hears of every phase; started by the caller. None for no limits.
    """

    def __init__(
        self,
        stage: Stage,
        run_folder: Path,
        resume_from: Path | None,
        device: torch.device,
        begins_stage: bool = False,
        evaluator: Evaluator | None = None,
        watchdog: Watchdog | None = None,
    ):
        recipe, shards, place = stage.recipe, stage.shards, stage.place
        self.recipe, self.place = recipe, place
        self.watchdog = watchdog or Watchdog(recipe.train.hang_timeout)
        self.device, self.evaluator = device, evaluator
        self.run_folder = run_folder
        self.checkpoints = run_folder / CHECKPOINTS_FOLDER
        self.schedule = RunSchedule(recipe, sum(shard.num_samples for shard in shards))
        self.num_steps = self.schedule.num_steps

        init = recipe.model.init if resume_from is None else ""
        self.stepper = Stepper(recipe, stage.ds_config, device, init)
        self.step = 0
        self.counts = SampleCounts(recipe.caption_keys)
        self.evaluations: dict[str, dict] = {}
        self.wandb_id = ""
        self._fingerprint = fingerprint(recipe, shards)
        self._scores = build_score_keeper(
            recipe, self.schedule.teaching, run_folder, self._fingerprint[SHARD_LIST], place
        )
        cursors, saved = None, None
        if resume_from is not None:
            cursors = self._resume(resume_from, shards, begins_stage)
            saved = self._moment if lies_in(self.checkpoints, resume_from) else None
        self._saver = Saver(
            self.checkpoints, self.stepper.engine, self.stepper.teacher, recipe.train, saved
        )
        self._timer, self.watch = StepTimer(), StepWatch()
        self._host_bound = HostBound(recipe, stage.ds_config.stage)
        self.loader = build_train_loader(
            recipe, shards, rank(), world_size(), cursors, self.step, self._scores.files
        )
        self._cursors = self.loader.cursors
        self._loading = LoadingNotice(self.loader, self._timer, device)
        tracker = None
        if recipe.train.wandb and rank() == 0:
            values = recipe.model_dump(mode="json")
            tracker = WandbTracker(recipe.train.wandb, run_folder, self.wandb_id, values)
            self.wandb_id = tracker.id
        length = place.run_length(self.schedule.total_samples, self.num_steps)
        self.logger = MetricsLogger(run_folder, *length, self.samples, tracker)

    @property
    def samples(self) -> int:
        """Samples that the run has seen, in all its stages."""
        return self.place.samples + self.step * self.recipe.train.global_batch_size

    @property
    def _moment(self) -> Moment:
        return self.samples, list(self.evaluations)

    @property
    def _evaluation_name(self) -> str:
        """What an evaluation of this moment is called."""
        return evaluation_at(self.samples)

    def train(self) -> bool:
        """Trains to the stage's end; returns False where a signal stopped the run."""
        with self.watch.listening():
            if self.samples == 0:
                self._evaluate("before")
            elif self._evaluation_is_due():  # a signal ended the run before it
                self._evaluate(self._evaluation_name)
            self._timer.reset()
            batches = iter(self.loader)
            first = self.step + 1
            while self.step < self.num_steps:
                self._begin_epoch()
                self.watchdog.enter(LOADING, self.step + 1)
                with self._timer.waiting():
                    batch = next(batches)
                self.watchdog.enter(COMPUTING, self.step + 1)
                terms = self.train_step(batch)
                if self.step == first:
                    self._saver.prepare()
                self._timer.step(self.recipe.train.global_batch_size)
                self._loading.after_step()
                stop = self._after_step(batch, terms)
                if stop:
                    self._save(required=True)
                    return False
            self._settle()
            self._scores.end_epoch()
            end = "end" if self.place.is_last else self._evaluation_name
            if end not in self.evaluations:
                # What was trained is saved first, since an evaluation can fail.
                self._save(required=True, uploads=self.evaluator is None)
                self._evaluate(end)
            self._save(required=True)
            if self.place.is_last:
                return True
            self._scores.end_stage()
            return not self.watch.is_told_to_stop()

    def close(self) -> None:
        """Ends the log files and waits for a checkpoint and an upload that are under way."""
        self.logger.close()
        self._saver.close()

    def train_step(self, batch: Batch) -> dict[str, Tensor]:
        """One optimizer update on this rank's part of the global batch; see Stepper.step."""
        step, schedule = self.step + 1, self.schedule
        terms = self.stepper.step(
            batch, schedule.learning_rate(step), schedule.momentum(step), schedule.progress(step)
        )
        self.step += 1
        return terms

    def _after_step(self, batch: Batch, terms: dict[str, Tensor]) -> bool:
        """Logs, evaluates and saves what is due; returns whether a signal asks to stop."""
        self._settle()
        self._host_bound.look(self.watch.was_ready, self._timer.data_wait_percent)
        signals = self.watch.take_signals()
        watched = {
            GRADIENT_NORM: self.stepper.gradient_norm(),
            LOGIT_SCALE: self.stepper.logit_scale,
        }
        if self._saver.asks():
            self.watch.receive(signal.SIGUSR1)
        counts = self.counts.of_batch(batch)
        counts += self._scores.put(self.step, batch.to_teach, self.stepper.coded)
        self.watch.put(self.step, terms | watched, batch.keys, counts)
        self._cursors = batch.cursors

        train = self.recipe.train
        if signal.SIGTERM in signals:
            return True
        if self._evaluation_is_due():
            self._evaluate(self._evaluation_name)
            self._timer.reset()
        is_due = self.schedule.is_due(train.checkpoint_every, self.step)
        if signal.SIGUSR1 in signals or (is_due and self.step < self.num_steps):
            self._save()
            self._timer.reset()
        return False

    def _begin_epoch(self) -> None:
        """Brings together what the ranks keep of the teacher's scores, where an epoch begins."""
        if self._scores.begins(self.step + 1):
            self.watchdog.enter(SAVING, self.step)
            self._settle()
            self._scores.begin(self.step + 1)

    def _evaluation_is_due(self) -> bool:
        is_new = self.step < self.num_steps and self._evaluation_name not in self.evaluations
        return is_new and self.schedule.is_evaluated(self.step, self.place.samples)

    def _settle(self) -> None:
        """Reads the last step that was not read yet: counts its samples, and logs it if that is
        due.

        Raises:
            NonFiniteLoss: on every rank, see StepWatch.settle.
        """
        watched = self.watch.settle()
        if watched is None:
            return
        self._scores.settle(self.counts.add(watched.counts))
        if self.schedule.is_logged(watched.step) or watched.step == self.num_steps:
            self._log(watched)

    def _log(self, watched: WatchedStep) -> None:
        terms, step = dict(watched.terms), watched.step
        gradient_norm, logit_scale = terms.pop(GRADIENT_NORM), terms.pop(LOGIT_SCALE)
        line = StepLine(
            self.place.samples + step * self.recipe.train.global_batch_size,
            self.place.steps + step,
            terms,
            memory_gib=peak_memory_gib(),
            **self.schedule.logged(step),
            logit_scale=logit_scale,
            gradient_norm=gradient_norm,
            skipped=self.counts.skipped,
            repeated=self.counts.repeated,
            noted=self.counts.noted,
            images_per_second=self._timer.images_per_second,
            data_wait_percent=self._timer.data_wait_percent,
            taught=self._scores.take_share(),
        )
        self.logger.log(line)

    def _evaluate(self, when: str) -> None:
        self.watchdog.enter(EVALUATING, self.step)
        self._settle()
        if self.evaluator is not None:
            self.stepper.engine.eval()
            models, teacher = evaluated_models(self.stepper), mask_teacher(self.stepper)
            evaluation = self.evaluator(models, teacher, self.schedule.progress(self.step + 1))
            self.stepper.engine.train()
            self.evaluations[when] = evaluation.metrics
            if evaluation.picture is not None:
                self.logger.log_kept_patches(evaluation.picture, self.samples)
            for name, metrics in evaluation.metrics.items():
                if name != "chance":
                    warning = evaluation.warning if name == "mask" else ""
                    self.logger.log_evaluation(EvaluationLine(self.samples, name, metrics, warning))
        if self.evaluator is not None or self.step > 0:
            self.logger.write_report()

    def _save(self, required: bool = False, uploads: bool = True) -> None:
        """Saves a checkpoint of this moment unless there is one; see Saver.save.

        Raises:
            CheckpointError: on every rank, if it could not be written and is `required`.
        """
        self.watchdog.enter(SAVING, self.step)
        self._settle()
        self._scores.sync()
        if self._saver.is_saved(self._moment):
            return
        state = {
            "samples": self.samples,
            "step": self.step,
            "stage": self.place.begun,
            "world_size": world_size(),
            "cursors": all_gather_rows(self._cursors.to(self.device)).tolist(),
            **self.counts.state(),
            "evaluations": self.evaluations,
            "data": self._fingerprint,
            "wandb_id": self.wandb_id,
        }
        self._saver.save(state, self._moment, required, uploads)
        self._scores.forget(self.checkpoints, self.step)

    def _resume(self, folder: Path, shards: list[Shard], begins_stage: bool) -> Tensor | None:
        """Continues from a checkpoint; returns all lanes' cursors, None where the stage begins."""
        state = checkpoint.read_state(folder)
        if begins_stage:
            self.stepper.begin_stage(folder)
        else:
            check_progress(self.recipe, shards, state, folder)
            self.stepper.load(folder, state["step"])
            self.step = state["step"]
        self.counts.restore(state)
        self.evaluations = state["evaluations"]
        if self.step < self.num_steps:
            self.evaluations.pop("end", None)  # of a shorter schedule
        if lies_in(self.checkpoints, folder):
            self.wandb_id = state.get("wandb_id", "")  # that of another run stays that run's
        return None if begins_stage else torch.tensor(state["cursors"])
