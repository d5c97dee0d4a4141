"""The training loop: batches in, steps, and what is due between two of them."""

import signal
import time
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from aclip.config.ds_config import DsConfig
from aclip.config.recipe import Recipe
from aclip.data.batch import Batch
from aclip.data.loader import build_train_loader, fingerprint
from aclip.data.shards.listing import SKIP_KINDS, Shard
from aclip.distributed import all_gather_rows, rank, world_size
from aclip.errors import ConfigError
from aclip.method.schedules import count_steps, ema_momentum, learning_rate
from aclip.reports.report import write_report
from aclip.run_folder.layout import CHECKPOINTS_FOLDER
from aclip.run_folder.metrics_file import EvaluationLine, StepLine
from aclip.training import checkpoint
from aclip.training.metrics_logger import MetricsLogger, peak_memory_gib
from aclip.training.step_timer import StepTimer
from aclip.training.step_watch import StepWatch
from aclip.training.stepper import Stepper
from aclip.training.upload import Uploader
from aclip.training.wandb_tracker import WandbTracker
from aclip.training.watchdog import COMPUTING, EVALUATING, LOADING, SAVING, Watchdog

GRADIENT_NORM = "gradient_norm"


class Trainer:
    """Trains one recipe from its data to its last sample.

    Args:
        recipe: what to train.
        ds_config: checked against the recipe and the number of ranks.
        shards: the training data, in the recipe's order.
        run_folder: where checkpoints and metrics go.
        resume_from: a checkpoint folder, or None to start new.
        device: of this rank.
        evaluator: evaluator(trainer) gives {"student": metrics, "teacher": metrics}; or None.
        watchdog: hears of every phase; started by the caller. None for no limits.
    """

    def __init__(
        self,
        recipe: Recipe,
        ds_config: DsConfig,
        shards: list[Shard],
        run_folder: Path,
        resume_from: Path | None,
        device: torch.device,
        evaluator=None,
        watchdog: Watchdog | None = None,
    ):
        self.recipe = recipe
        self.watchdog = watchdog or Watchdog(recipe.train.hang_timeout)
        self.device = device
        self.evaluator = evaluator
        self.run_folder = run_folder
        self.checkpoints = run_folder / CHECKPOINTS_FOLDER
        dataset_size = sum(shard.num_samples for shard in shards)
        batch_size = recipe.train.global_batch_size
        self.num_steps = count_steps(recipe.train.epochs, dataset_size, batch_size)
        self.total_samples = self.num_steps * batch_size
        self.warmup_samples = round(recipe.train.warmup_epochs * dataset_size)

        init = recipe.model.init if resume_from is None else ""
        self.stepper = Stepper(recipe, ds_config, device, init)
        self.step = 0
        self.cursors: Tensor | None = None
        self.skipped = Counter()
        self.evaluations: dict[str, dict] = {}
        self.wandb_id = ""
        self._fingerprint = fingerprint(recipe.data, shards)
        if resume_from is not None:
            self._resume(resume_from)
        self._saved_at = self.samples if resume_from is not None else None
        self.stepper.set_exact_logit_scale()
        self._recent_skips = Counter()
        self.watch = StepWatch()
        self._local_cursors: Tensor | None = None
        self.loader = build_train_loader(recipe, shards, rank(), world_size(), self.cursors)
        tracker = None
        if recipe.train.wandb and rank() == 0:
            values = recipe.model_dump(mode="json")
            tracker = WandbTracker(recipe.train.wandb, run_folder, self.wandb_id, values)
            self.wandb_id = tracker.id
        self.logger = MetricsLogger(run_folder, self.total_samples, self.samples, tracker)
        url = recipe.train.upload_to
        self._uploader = Uploader(url) if url and rank() == 0 else None

    @property
    def samples(self) -> int:
        return self.step * self.recipe.train.global_batch_size

    @property
    def _place(self) -> str:
        """What an evaluation of this moment is called."""
        return f"{self.samples} samples"

    def train(self) -> bool:
        """Trains to the end; returns False when a signal stopped the run after a checkpoint."""
        with self.watch.listening():
            if self.step == 0:
                self._evaluate("before")
            elif self._evaluation_is_due():  # a signal ended the run before it
                self._evaluate(self._place)
            timer = StepTimer()
            batches = iter(self.loader)
            while self.step < self.num_steps:
                self.watchdog.enter(LOADING, self.step + 1)
                with timer.waiting():
                    batch = next(batches)
                self.watchdog.enter(COMPUTING, self.step + 1)
                terms = self.train_step(batch)
                timer.step(self.recipe.train.global_batch_size)
                stop = self._after_step(batch, terms, timer)
                if stop:
                    self._save(required=True)
                    return False
            self.watch.settle()
            if "end" not in self.evaluations:
                # First what was trained, since an evaluation can fail.
                self._save(required=True, uploads=self.evaluator is None)
                self._evaluate("end")
                if self.evaluator is not None:
                    self._saved_at = None
            self._save(required=True)
            return True

    def close(self) -> None:
        """Ends the log files and waits for an upload."""
        self.logger.close()
        if self._uploader is not None:
            self._uploader.close()

    def train_step(self, batch: Batch) -> dict[str, Tensor]:
        """One optimizer update on this rank's part of the global batch; see Stepper.step."""
        config, teacher = self.recipe.optimizer, self.recipe.teacher
        self.learning_rate = learning_rate(
            self.samples,
            total=self.total_samples,
            warmup=self.warmup_samples,
            start=config.warmup_start_lr,
            peak=config.lr,
            final=config.final_lr,
        )
        self.momentum = None
        if teacher is not None:
            self.momentum = ema_momentum(
                self.samples, total=self.total_samples, start=teacher.momentum
            )
        terms = self.stepper.step(batch, self.learning_rate, self.momentum)
        self.step += 1
        return terms

    def _after_step(self, batch: Batch, terms: dict[str, Tensor], timer: StepTimer) -> bool:
        """Logs, evaluates and saves what is due; returns whether a signal asks to stop."""
        self.watch.settle()
        signals = self.watch.take_signals()
        self.watch.put(self.step, terms | self._gradient_norm(), batch.keys)
        self._local_cursors = batch.cursors
        self._recent_skips.update(batch.skipped)

        train = self.recipe.train
        at_end = self.step == self.num_steps
        if self.step % train.log_every == 0 or at_end:
            self._log(timer)
        if signal.SIGTERM in signals:
            return True
        if self._evaluation_is_due():
            self._evaluate(self._place)
            timer.reset()
        if signal.SIGUSR1 in signals or (not at_end and self._is_due(train.checkpoint_every)):
            self._save()
            timer.reset()
        return False

    def _evaluation_is_due(self) -> bool:
        is_due = self.step < self.num_steps and self._is_due(self.recipe.train.evaluate_every)
        return is_due and self._place not in self.evaluations

    def _is_due(self, every: int) -> bool:
        """Whether a multiple of `every` samples lies in the step that just ended."""
        previous = self.samples - self.recipe.train.global_batch_size
        return every > 0 and self.samples // every > previous // every

    def _log(self, timer: StepTimer) -> None:
        self._join_skips()
        terms = self.watch.mean_terms()
        gradient_norm = terms.pop(GRADIENT_NORM, None)
        line = StepLine(
            self.samples,
            self.step,
            terms,
            memory_gib=peak_memory_gib(),
            learning_rate=self.learning_rate,
            momentum=self.momentum,
            logit_scale=self.stepper.engine.module.logit_scale.exact.exp().item(),
            gradient_norm=gradient_norm,
            skipped=dict(self.skipped),
            images_per_second=timer.images_per_second,
            data_wait_percent=timer.data_wait_percent,
        )
        self.logger.log(line)

    def _gradient_norm(self) -> dict[str, Tensor]:
        """Of the whole gradient, before clipping; where it is not finite, DeepSpeed has skipped
        the update."""
        norm = self.stepper.engine.get_global_grad_norm()
        if norm is None:  # without ZeRO
            return {}
        if not torch.is_tensor(norm):
            norm = torch.full((), norm, device=self.device)
        return {GRADIENT_NORM: norm.to(self.device)}

    def _join_skips(self) -> None:
        """Adds the samples skipped since the last call, of all ranks, to the run's total."""
        counts = torch.tensor([self._recent_skips[k] for k in SKIP_KINDS], device=self.device)
        if world_size() > 1:
            dist.all_reduce(counts)
        for kind, count in zip(SKIP_KINDS, counts.tolist(), strict=True):
            if count:
                self.skipped[kind] += count
        self._recent_skips.clear()

    def _evaluate(self, when: str) -> None:
        self.watchdog.enter(EVALUATING, self.step)
        if self.evaluator is not None:
            self.stepper.engine.eval()
            results = self.evaluator(self)
            self.stepper.engine.train()
            self.evaluations[when] = results
            for name, metrics in results.items():
                if name != "chance":
                    self.logger.log_evaluation(EvaluationLine(self.samples, name, metrics))
        if rank() == 0 and (self.evaluator is not None or self.step > 0):
            self._report()

    def _report(self) -> None:
        try:
            write_report([self.run_folder], self.run_folder)
        # Whatever is wrong with a report, it must not end a run of days.
        except Exception as error:
            print(f"the report was not written: {type(error).__name__}: {error}", flush=True)

    def _save(self, required: bool = False, uploads: bool = True) -> None:
        """Writes a checkpoint of this moment unless there is one, and uploads it if the recipe and
        `uploads` say so.

        Raises:
            CheckpointError: on every rank, if it could not be written and is `required`; without,
                the run says so and goes on.
        """
        if self._saved_at == self.samples:
            return
        self.watchdog.enter(SAVING, self.step)
        self.watch.settle()
        self._join_skips()
        if self._local_cursors is not None:
            self.cursors = all_gather_rows(self._local_cursors.to(self.device)).cpu()
        state = {
            "samples": self.samples,
            "step": self.step,
            "world_size": world_size(),
            "cursors": None if self.cursors is None else self.cursors.tolist(),
            "skipped": dict(self.skipped),
            "evaluations": self.evaluations,
            "data": self._fingerprint,
            "wandb_id": self.wandb_id,
        }
        start = time.perf_counter()
        train, uploader = self.recipe.train, self._uploader
        try:
            folder = checkpoint.save(
                *(self.checkpoints, self.stepper.engine, self.stepper.teacher, state),
                train.keep_checkpoints,
                train.keep_every,
                uploader.unfinished if uploader is not None else set(),
            )
        except checkpoint.CheckpointError as error:
            if required:
                raise
            self._say(f"{error}; the run goes on, and the checkpoint before is intact")
            return
        self._say(f"checkpoint {folder.name} in {time.perf_counter() - start:.2f} s")
        if uploader is not None and uploads:
            uploader.put(folder)
        self._saved_at = self.samples

    def _say(self, text: str) -> None:
        if rank() == 0:
            print(text, flush=True)

    def _check_continues(self, folder: Path, state: dict) -> None:
        """Refuses a checkpoint after which the stream of samples would not go on as it was."""
        batch_size = self.recipe.train.global_batch_size
        if state["samples"] != state["step"] * batch_size:
            raise ConfigError(
                f"train.global_batch_size is {batch_size}, but {folder} was trained with "
                f"{state['samples'] // state['step']}; set it back, or use --resume none"
            )
        if state["data"] != self._fingerprint:
            field = "data.sources" if self.recipe.data.sources else "data.train"
            raise ConfigError(
                f"{field} gives {self._fingerprint}, but {folder} was trained on {state['data']}; "
                "give the same shards, or use --resume none with another --output"
            )

    def _resume(self, folder: Path) -> None:
        state = checkpoint.read_state(folder)
        self._check_continues(folder, state)
        checkpoint.load(folder, self.stepper.engine, self.stepper.teacher, state["step"])
        self.step = state["step"]
        self.cursors = torch.tensor(state["cursors"])
        self.skipped.update(state["skipped"])
        self.evaluations = state["evaluations"]
        if self.step < self.num_steps:
            self.evaluations.pop("end", None)  # of a shorter schedule
        self.wandb_id = state.get("wandb_id", "")
