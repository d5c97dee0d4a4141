"""The training loop: `train_step` is the one place that knows the order of a step."""

import signal
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from aclip import checkpoint, losses, masking
from aclip.config import Recipe
from aclip.data.augment import augment
from aclip.data.batch import Batch, build_train_loader
from aclip.data.shards import SKIP_KINDS, Shard
from aclip.engine import DsConfig, build_engine
from aclip.errors import ConfigError
from aclip.gather import all_gather_rows, rank, world_size
from aclip.metrics import MetricsLogger, StepTimer
from aclip.models.student import StudentOutput, build_student, kept_blocks
from aclip.models.text import real_token_ids
from aclip.random_state import get_random_state, set_random_state
from aclip.schedules import ema_momentum, learning_rate
from aclip.sharded_state import ShardedState
from aclip.teacher import Teacher, TeacherOutput
from aclip.watch import StepWatch

EXIT_STOPPED_BY_SIGNAL = 143
LOGIT_SCALE = "logit_scale.log_logit_scale"


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
    ):
        self.recipe = recipe
        self.device = device
        self.dtype = ds_config.dtype
        self.micro_batch_size = ds_config.micro_batch_size
        self._offloads = ds_config.offloads_optimizer
        self.evaluator = evaluator
        self.checkpoints = run_folder / "checkpoints"
        dataset_size = sum(shard.num_samples for shard in shards)
        batch_size = recipe.train.global_batch_size
        self.num_steps = max(1, round(recipe.train.epochs * dataset_size / batch_size))
        self.total_samples = self.num_steps * batch_size
        self.warmup_samples = round(recipe.train.warmup_epochs * dataset_size)

        student = build_student(recipe)
        self.grid = student.image.grid
        self.num_kept_blocks = kept_blocks(recipe, self.grid)
        self.teacher = Teacher(student, self.dtype, device) if recipe.needs_teacher else None
        self.engine = build_engine(student, recipe.optimizer, ds_config)
        self.sharded_state = ShardedState(self.engine)

        self.step = 0
        self.cursors: Tensor | None = None
        self.skipped = Counter()
        self.evaluations: dict[str, dict] = {}
        self._fingerprint = {"shards": len(shards), "samples": dataset_size}
        if resume_from is not None:
            self._resume(resume_from)
        self._saved_at = self.samples if resume_from is not None else None
        self._set_exact_logit_scale()
        self._recent_skips = Counter()
        self.watch = StepWatch()
        self._local_cursors: Tensor | None = None
        self.loader = build_train_loader(recipe, shards, rank(), world_size(), self.cursors)
        self.logger = MetricsLogger(run_folder, self.total_samples, resumed_samples=self.samples)

    @property
    def samples(self) -> int:
        return self.step * self.recipe.train.global_batch_size

    def train(self) -> bool:
        """Trains to the end; returns False when a signal stopped the run after a checkpoint."""
        with self.watch.listening():
            if self.step == 0:
                self._evaluate("before")
            timer = StepTimer()
            batches = iter(self.loader)
            while self.step < self.num_steps:
                with timer.waiting():
                    batch = next(batches)
                terms = self.train_step(batch)
                timer.step(self.recipe.train.global_batch_size)
                stop = self._after_step(batch, terms, timer)
                if stop:
                    self._save()
                    return False
            self.watch.settle()
            if "end" not in self.evaluations:
                self._evaluate("end")
            self._save()
            return True

    def close(self) -> None:
        """Ends the log files."""
        self.logger.close()

    def train_step(self, batch: Batch) -> dict[str, Tensor]:
        """One optimizer update on this rank's part of the global batch.

        The losses span the whole global batch whatever the micro-batch is: with several micro_steps
        the towers run on all but the last without gradient, heads and losses run on all features
        at once, and the towers run again on the others with their features' gradients. That is
        exact, BatchNorm included.

        Returns:
            Unweighted loss terms and `loss`, of this rank, detached.
        """
        self._set_learning_rate()
        micro_batches = batch.split(self.micro_batch_size)
        taught = [self._teach(micro) for micro in micro_batches]
        selections = [self._select(m, t) for m, t in zip(micro_batches, taught, strict=True)]
        features, rng_states = self._encode(micro_batches, selections)
        output = StudentOutput(
            **self.engine("project", *(torch.cat(part) for part in zip(*features, strict=True)))
        )
        byol_target = None
        if self.recipe.loss.byol > 0:
            byol_target = self.teacher.project(torch.cat([t.features for t in taught]))
        weights = self.recipe.loss
        loss, terms = losses.total(
            output, byol_target, weights.model_dump(), weights.simclr_temperature
        )
        self._backward(loss, last=len(micro_batches) == 1)
        self._backward_through_towers(micro_batches, selections, features, rng_states)
        self.engine.step()
        self._set_exact_logit_scale()
        if self.teacher is not None:
            momentum = ema_momentum(
                self.samples, total=self.total_samples, start=self.recipe.teacher.momentum
            )
            self.teacher.update(self.engine.module, momentum)
        self.step += 1
        return {"loss": loss.detach(), **terms}

    def _teach(self, micro: Batch) -> TeacherOutput | None:
        if self.teacher is None:
            return None
        pixels = augment(micro.teacher_view.to(self.device), None, self.recipe.augment, self.dtype)
        return self.teacher.forward(pixels)

    def _select(self, micro: Batch, taught: TeacherOutput | None) -> masking.Selection | None:
        def to_device(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(self.device, non_blocking=True)

        return masking.select(
            self.recipe.mask.policy,
            self.num_kept_blocks,
            self.recipe.mask.block_size,
            teacher_scores=None if taught is None else taught.scores,
            teacher_box=to_device(micro.teacher_box),
            view_boxes=to_device(micro.student_boxes),
            noise=to_device(micro.mask_noise),
        )

    def _encode_one(self, micro: Batch, selection: masking.Selection | None):
        views = micro.student_views.to(self.device, non_blocking=True)
        params = micro.augment_params.to(self.device, non_blocking=True)
        pixels = augment(views.flatten(0, 1), params.flatten(0, 1), self.recipe.augment, self.dtype)
        # Counted while the tokens are on the CPU: on the device, the step would wait for the count.
        real_ids = real_token_ids(micro.tokens)
        if micro.tokens.is_pinned():
            real_ids = real_ids.pin_memory()
        return self.engine(
            "encode",
            pixels.unflatten(0, views.shape[:2]),
            selection,
            micro.tokens.to(self.device, non_blocking=True),
            real_ids.to(self.device, non_blocking=True),
        )

    def _encode(self, micro_batches, selections):
        """Features (B, V, C), (B, W) of each micro-batch, and the random state before it.

        Only the last keeps its graph; the others are leaves that collect a gradient. (ZeRO-3 takes
        a step's first backward pass as the one that overwrites old gradients, so that pass must
        reach every parameter.)
        """
        features, rng_states = [], []
        for micro, selection in zip(micro_batches, selections, strict=True):
            is_last = micro is micro_batches[-1]
            rng_states.append(get_random_state())
            with torch.set_grad_enabled(is_last):
                parts = self._encode_one(micro, selection)
            features.append(parts if is_last else [part.requires_grad_() for part in parts])
        return features, rng_states

    def _backward_through_towers(self, micro_batches, selections, features, rng_states) -> None:
        """Runs the towers again on all micro-batches but the last, with their gradients."""
        num_again = len(micro_batches) - 1
        for index in range(num_again):
            # The same dropout as in the pass whose features the losses saw.
            set_random_state(rng_states[index])
            parts = self._encode_one(micro_batches[index], selections[index])
            surrogate = sum(
                (part.float() * leaf.grad.float()).sum()
                for part, leaf in zip(parts, features[index], strict=True)
            )
            self._backward(surrogate, last=index == num_again - 1)

    def _backward(self, loss: Tensor, last: bool) -> None:
        # Offload copies gradients to the host at the boundary, and only those of its own backward
        # pass; the heads are in the first one alone, so every pass is a boundary then.
        self.engine.set_gradient_accumulation_boundary(last or self._offloads)
        self.engine.backward(loss, scale_wrt_gas=False)

    def _set_learning_rate(self) -> None:
        config = self.recipe.optimizer
        self.learning_rate = learning_rate(
            self.samples,
            total=self.total_samples,
            warmup=self.warmup_samples,
            start=config.warmup_start_lr,
            peak=config.lr,
            final=config.final_lr,
        )
        for group in self.engine.optimizer.param_groups:
            group["lr"] = self.learning_rate

    def _set_exact_logit_scale(self) -> None:
        ceiling = torch.tensor(self.recipe.loss.max_logit_scale).log().item()
        exact = self.sharded_state.clamp_max(LOGIT_SCALE, ceiling)
        self.engine.module.logit_scale.exact = exact

    def _after_step(self, batch: Batch, terms: dict[str, Tensor], timer: StepTimer) -> bool:
        """Logs, evaluates and saves what is due; returns whether a signal asks to stop."""
        self.watch.settle()
        signals = self.watch.take_signals()
        self.watch.put(self.step, terms, batch.keys)
        self._local_cursors = batch.cursors
        self._recent_skips.update(batch.skipped)

        train = self.recipe.train
        at_end = self.step == self.num_steps
        if self.step % train.log_every == 0 or at_end:
            self._log(timer)
        if signal.SIGTERM in signals:
            return True
        if not at_end and self._is_due(train.evaluate_every):
            self._evaluate(f"{self.samples} samples")
            timer.reset()
        if signal.SIGUSR1 in signals or (not at_end and self._is_due(train.checkpoint_every)):
            self._save()
            timer.reset()
        return False

    def _is_due(self, every: int) -> bool:
        """Whether a multiple of `every` samples lies in the step that just ended."""
        previous = self.samples - self.recipe.train.global_batch_size
        return every > 0 and self.samples // every > previous // every

    def _log(self, timer: StepTimer) -> None:
        self._join_skips()
        self.logger.log(
            self.step,
            self.samples,
            self.watch.mean_terms(),
            learning_rate=self.learning_rate,
            logit_scale=self.engine.module.logit_scale.exact.exp().item(),
            gradient_norm=_to_float(self.engine.get_global_grad_norm()),
            skipped=dict(self.skipped),
            **timer.summary(),
        )

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
        if self.evaluator is None:
            return
        self.engine.eval()
        results = self.evaluator(self)
        self.engine.train()
        self.evaluations[when] = results
        for name, metrics in results.items():
            if name != "chance":
                self.logger.log_evaluation(self.samples, name, metrics)

    def _save(self) -> None:
        """Writes a checkpoint of this moment unless there is one; the run survives a full disk."""
        if self._saved_at == self.samples:
            return
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
        }
        keep = self.recipe.train.keep_checkpoints
        checkpoint.save(self.checkpoints, self.engine, self.teacher, state, keep)
        self._saved_at = self.samples

    def _check_continues(self, folder: Path, state: dict) -> None:
        """Refuses a checkpoint after which the stream of samples would not go on as it was."""
        batch_size = self.recipe.train.global_batch_size
        if state["samples"] != state["step"] * batch_size:
            raise ConfigError(
                f"train.global_batch_size is {batch_size}, but {folder} was trained with "
                f"{state['samples'] // state['step']}; set it back, or use --resume none"
            )
        if state["data"] != self._fingerprint:
            raise ConfigError(
                f"data.train has {self._fingerprint}, but {folder} was trained on {state['data']}; "
                "give the same shards, or use --resume none with another --output"
            )

    def _resume(self, folder: Path) -> None:
        state = checkpoint.read_state(folder)
        self._check_continues(folder, state)
        checkpoint.load(folder, self.engine, self.teacher, state["step"])
        self.step = state["step"]
        self.cursors = torch.tensor(state["cursors"])
        self.skipped.update(state["skipped"])
        self.evaluations = state["evaluations"]


def _to_float(value) -> float | None:
    return None if value is None else float(value)
