"""One optimizer update: `Stepper.step` is the one place that knows the order of a step."""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from aclip.config.ds_config import DsConfig
from aclip.config.recipe import Recipe
from aclip.data.batch import Batch
from aclip.distributed import rank
from aclip.engine.build import build_engine
from aclip.engine.gradient_norm import found_by_engine, gradient_norm
from aclip.engine.sharded_state import MASTER, ShardedState
from aclip.method.losses.term import StudentOutput, total
from aclip.models.student import Student, build_student
from aclip.training import checkpoint
from aclip.training.begin_stage import begin_stage
from aclip.training.random_state import get_random_state, set_random_state
from aclip.training.step_inputs import StepInputs
from aclip.training.teacher import Teacher
from aclip.weights.initial_weights import load_initial_weights


class Stepper:
    """Student, teacher and optimizer of a recipe, and how one batch updates them.

    Args:
        recipe: what is trained.
        ds_config: checked against the recipe and the number of ranks.
        device: this rank's device.
        init: weights to start from, see ModelConfig.init; empty for none.

    Attributes:
        engine: DeepSpeed's engine around the student.
        init_report: what became of the keys of `init`; None without `init`.
        teacher: the average of the weights; None where the recipe has neither a teacher nor
            train.average.
        terms: the loss terms that have a weight.
        coded: what the teacher scored in the last step, for a recipe that keeps it: the samples'
            Batch.score_place on the CPU, and their Taught.codes, of each micro-batch.
    """

    def __init__(self, recipe: Recipe, ds_config: DsConfig, device: torch.device, init: str = ""):
        self.recipe = recipe
        self.device = device
        self.dtype = ds_config.dtype
        self.micro_batch_size = ds_config.micro_batch_size
        self._offloads = ds_config.offloads_optimizer
        student = build_student(recipe)
        self.init_report = load_initial_weights(student, init) if init else None
        exact = _copy_of_weights(student) if init and self.dtype != torch.float32 else {}
        self.terms = student.terms
        keeps_average = recipe.average_momentum is not None
        self.teacher = Teacher(student, self.dtype, device) if keeps_average else None
        self.inputs = StepInputs(
            recipe, student.terms, self.teacher, student.image, device=device, dtype=self.dtype
        )
        self.engine = build_engine(student, recipe.optimizer, ds_config)
        self._sharded_state = ShardedState(self.engine)
        self._gradient_norm: Tensor | None = None
        self.coded: list[tuple[Tensor, Tensor]] = []
        self._exact_scalars = student.exact_scalars()
        for name, weights in exact.items():
            self._sharded_state.load(name, MASTER, weights)
        self._share_exact_scalars()
        # Weights are drawn alike on all ranks, dropout is not.
        torch.manual_seed(recipe.train.seed + rank())

    def load(self, folder: Path, step: int) -> None:
        """Continues from a checkpoint; see checkpoint.load."""
        checkpoint.load(folder, self.engine, self.teacher, step)
        self._share_exact_scalars()

    def begin_stage(self, folder: Path) -> None:
        """Goes on with what the stage before left in a checkpoint; see training/begin_stage.py."""
        begin_stage(folder, self.engine, self.teacher, self.recipe.optimizer.keep_state)
        self._share_exact_scalars()

    def _share_exact_scalars(self) -> None:
        """Clamps the learned numbers' fp32 masters and hands them to the forward pass."""
        for name, scalar in self._exact_scalars.items():
            scalar.exact = self._sharded_state.clamp_max(name, scalar.ceiling)

    def step(
        self, batch: Batch, learning_rate: float, momentum: float | None, progress: float = 1.0
    ) -> dict[str, Tensor]:
        """One optimizer update on this rank's part of the global batch.

        The losses span the whole global batch whatever the micro-batch is: with several micro_steps
        the towers run on all but the last without gradient, heads and losses run on all features
        at once, and the towers run again on all but the last with their features' gradients. That
        is exact, BatchNorm included.

        Args:
            batch: this rank's part, on the CPU.
            learning_rate: the step's learning rate.
            momentum: the momentum of the teacher's average; None without one.
            progress: how much of the run is done, in [0, 1].

        Returns:
            This rank's unweighted loss terms and `loss`, detached.
        """
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate * group["lr_scale"]
        micro_batches = [self.inputs.with_views(m) for m in batch.split(self.micro_batch_size)]
        taught = [self.inputs.teach(micro) for micro in micro_batches]
        self.coded = [
            (micro.score_place, of_teacher.codes)
            for micro, of_teacher in zip(micro_batches, taught, strict=True)
            if of_teacher.codes is not None
        ]
        statistics = self.inputs.statistics(micro_batches, taught)
        # Made anew for each pass over a micro-batch, so that only one input exists at a time.
        make_inputs = [
            partial(self.inputs.student, micro, of_teacher, statistics, progress)
            for micro, of_teacher in zip(micro_batches, taught, strict=True)
        ]
        *first_inputs, make_last = make_inputs
        features, rng_states = self._encode_first(first_inputs)
        # Copies, since ZeRO-3's hooks put other tensors into the dictionaries that they are given.
        before = [dict(part) for part in features]
        projected = self.engine("encode_and_project", make_last(), before)
        output = StudentOutput.of(projected, self.inputs.num_captions(batch))
        targets = {} if self.teacher is None else self.teacher.targets(self.terms, taught)
        loss, terms = total(self.terms, output, targets)
        self._backward(loss, last=not first_inputs)
        self._backward_through_towers(first_inputs, features, rng_states)
        self._gradient_norm = gradient_norm(self.engine)
        self.engine.step()
        self._share_exact_scalars()
        if self.teacher is not None:
            self.teacher.update(self.engine.module, momentum)
        return {"loss": loss.detach(), **terms}

    @property
    def logit_scale(self) -> Tensor:
        """The factor itself, from its fp32 master, ()."""
        return self.engine.module.logit_scale.exact.exp().squeeze()

    def gradient_norm(self) -> Tensor:
        """The norm of the last step's whole gradient before clipping, () fp32."""
        if self._gradient_norm is None:
            self._gradient_norm = found_by_engine(self.engine)
        return self._gradient_norm

    def _encode_first(self, first_inputs) -> tuple[list[dict[str, Tensor]], list]:
        """Features of each micro-batch but the last, see Student.encode, and the random state
        before it.

        They are leaves that collect a gradient; only the last micro-batch keeps its graph. (ZeRO-3
        takes a step's first backward pass as the one that overwrites old gradients, so that pass
        must reach every parameter.)
        """
        features, rng_states = [], []
        for make in first_inputs:
            rng_states.append(get_random_state())
            with torch.no_grad():
                parts = self.engine("encode", make())
            features.append({name: part.requires_grad_() for name, part in parts.items()})
        return features, rng_states

    def _backward_through_towers(self, first_inputs, features, rng_states) -> None:
        """Runs the towers again on all micro-batches but the last, with their gradients."""
        drawn_so_far = get_random_state()
        for index, make in enumerate(first_inputs):
            # The same dropout as in the pass whose features the losses saw.
            set_random_state(rng_states[index])
            parts = self.engine("encode", make())
            surrogate = sum(
                (part.float() * features[index][name].grad.float()).sum()
                for name, part in parts.items()
            )
            self._backward(surrogate, last=make is first_inputs[-1])
        set_random_state(drawn_so_far)

    def _backward(self, loss: Tensor, last: bool) -> None:
        # With offload, a boundary copies gradients to the host, and only those of that backward
        # pass. The heads are in the first pass alone, so every pass has to be a boundary.
        self.engine.set_gradient_accumulation_boundary(last or self._offloads)
        self.engine.backward(loss, scale_wrt_gas=False)


def _copy_of_weights(student: Student) -> dict[str, Tensor]:
    """The fp32 weights, since DeepSpeed rounds the student before it makes its masters of it."""
    return {name: p.detach().clone() for name, p in student.named_parameters()}
