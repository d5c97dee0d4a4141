"""The EMA teacher: which patches matter, what BYOL aims at, and the model that is evaluated."""

import copy
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn

from aclip.engine.host_copy import bounded
from aclip.engine.sharded_state import gathered
from aclip.method.losses.term import LossTerm, Taught
from aclip.method.masks.policy import Selection
from aclip.method.tokens import Tokens
from aclip.models.student import Student


@dataclass
class TeacherOutput:
    """scores (B, S, S) fp32 attention per patch of the teacher view, features (B, C); each of them
    None where the tower has or the caller wants none."""

    scores: Tensor | None
    features: Tensor | None


class Teacher:
    """An exponential moving average of the student's towers, projections and averaged parts.

    The average is kept in fp32 whatever the compute dtype: at momentum 0.996 an average stored in
    bf16 misses most of a small learning rate's movement. Each rank holds all of it, so an update
    needs no communication except for ZeRO-3's gathering of the student's weights.

    Args:
        student: the student before DeepSpeed wraps it; it is copied.
        dtype: compute dtype of the forward passes.
        device: where the teacher lives.
    """

    def __init__(self, student: Student, dtype: torch.dtype, device: torch.device):
        self.model = copy.deepcopy(student)
        self.model.keep_parts(student.averaged_parts)
        self.model.requires_grad_(False).eval().to(device)
        self._average = {name: p.detach().float() for name, p in self.model.named_parameters()}
        self._chunks = None
        self.model.to(dtype)
        self._compute = dict(self.model.named_parameters())

    @torch.no_grad()
    def forward(
        self, pixels: Tensor, score_layers: int | None = None, with_features: bool = True
    ) -> TeacherOutput:
        """pixels (B, 3, T, T) normalised -> scores and features of the teacher view; see
        ImageTower.forward_with_scores."""
        features, scores = self.model.image.forward_with_scores(pixels, score_layers, with_features)
        return TeacherOutput(scores, features)

    @torch.no_grad()
    def encode_patches(self, pixels: Tensor) -> Tensor:
        """pixels (B, 3, R, R) normalised -> features of all patches (B, P, C)."""
        rows, _ = self.model.image.forward_patches(pixels)
        return rows[:, self.model.image.num_prefix :]

    @torch.no_grad()
    def targets(
        self, terms: tuple[LossTerm, ...], taught: list[Taught]
    ) -> dict[str, Tensor | None]:
        """What each loss term aims at, for the whole local batch, by the term's name."""
        return {term.name: term.target(self.model, taught) for term in terms}

    @torch.no_grad()
    def encode_image(self, pixels: Tensor, selection: Selection | None = None) -> Tensor:
        return self.model.encode_image(pixels, selection)

    @torch.no_grad()
    def encode_text(self, tokens: Tokens) -> Tensor:
        return self.model.encode_text(tokens)

    @torch.no_grad()
    def update(self, student: nn.Module, momentum: float) -> None:
        """average = momentum * average + (1 - momentum) * student, for every parameter.

        Args:
            student: the trained module; under ZeRO-3 its parameters are gathered here, so every
                rank must call.
            momentum: the average's share, in [0, 1].
        """
        if self._chunks is None:
            self._chunks = self._make_chunks(student)
        for averages, parameters in self._chunks:
            with gathered(parameters):
                weights = [parameter.detach() for parameter in parameters]
                if weights[0].dtype != torch.float32:
                    copies = _views_of_one_buffer(averages)
                    torch._foreach_copy_(copies, weights)
                    weights = copies
                torch._foreach_lerp_(averages, weights, 1 - momentum)
        self._refresh_compute_weights()

    def _make_chunks(self, student: nn.Module) -> list[tuple[list[Tensor], list[nn.Parameter]]]:
        """(averages, the student's parameters) that are updated together: of one dtype, and few
        enough to be copied to fp32, and gathered by ZeRO-3, at once."""
        pairs = [
            (self._average[name], parameter)
            for name, parameter in student.named_parameters()
            if name in self._average and parameter.requires_grad
        ]
        chunks = []
        for _, alike in groupby(pairs, key=lambda pair: pair[1].dtype):
            for some in bounded(alike, lambda pair: pair[0].numel()):
                averages, parameters = zip(*some, strict=True)
                chunks.append((list(averages), list(parameters)))
        return chunks

    def state_dict(self) -> dict[str, Tensor]:
        """The fp32 average by parameter name."""
        return self._average

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, average in self._average.items():
            average.copy_(state[name])
        self._refresh_compute_weights()

    def _refresh_compute_weights(self) -> None:
        names = [name for name, p in self._compute.items() if p.dtype != torch.float32]
        if names:
            torch._foreach_copy_(
                [self._compute[name].data for name in names],
                [self._average[name] for name in names],
            )


def _views_of_one_buffer(like: list[Tensor]) -> list[Tensor]:
    """Uninitialised tensors of the same shapes, in one allocation."""
    sizes = [tensor.numel() for tensor in like]
    parts = like[0].new_empty(sum(sizes)).split(sizes)
    return [part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]
