"""What a term of the loss is: all that it adds to recipe, student, batch and step, in one file.

Dimensions: B samples of this rank, V views, E embedding, C image and W text features, D head
outputs, G patches per side of a view, P = G * G, S patches per side of the teacher view.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from aclip.method.tokens import Tokens
from aclip.section import Section


@dataclass(frozen=True)
class TermPart:
    """A module that a term adds to the student, under the name it is given there.

    Attributes:
        module: a module, or a single parameter.
        averaged: whether the teacher holds its average.
        exported: whether it belongs to the model; otherwise it exists only during training.
    """

    module: nn.Module | nn.Parameter
    averaged: bool = False
    exported: bool = False


@dataclass(frozen=True)
class Taught:
    """What the teacher makes of a micro-batch; what nothing in the recipe reads is None.

    Attributes:
        scores: (B, S, S) fp32 attention per patch of the teacher view.
        features: (B, C), features of the teacher view.
        patches: (B, P, C), features of the first student view's patches.
        codes: (B, S, S) uint8, what the teacher has just scored, as it is kept (score_codes.py).
    """

    scores: Tensor | None = None
    features: Tensor | None = None
    patches: Tensor | None = None
    codes: Tensor | None = None


@dataclass(frozen=True)
class TermContext:
    """What a term may read of a micro-batch to make its own input.

    Attributes:
        pixels: (B, V, 3, R, R) normalised, on the student's device.
        tokens: the captions of B images, on the CPU.
        noise: (B, ...) fp32 uniform in [0, 1) on the CPU, in the term's `noise_shape`; or None.
        taught: what the teacher made of the micro-batch.
        statistic: what the term's `statistic` gave.
        teacher: the averaged student, for its parts; None where the recipe has no teacher.
        grid: G.
        patch_size: pixels per side of a patch.
        to_device: copies a tensor to the student's device without waiting for it.
    """

    pixels: Tensor
    tokens: Tokens
    noise: Tensor | None
    taught: Taught
    statistic: Tensor | None
    teacher: nn.Module | None
    grid: int
    patch_size: int
    to_device: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class StudentOutput:
    """What the terms are computed from.

    Attributes:
        image_embeds: (B, V, E), unnormalised.
        text_embeds: (B, E), unnormalised; with N captions of an image (B, N, E).
        logit_scale: (1,) fp32, the factor itself.
        heads: what each term's `project` gave, by the term's name.
        num_captions: (B,) int64, how many of an image's N captions there are; None where N is 1.
    """

    image_embeds: Tensor
    text_embeds: Tensor
    logit_scale: Tensor
    heads: dict[str, Tensor] = field(default_factory=dict)
    num_captions: Tensor | None = None

    @classmethod
    def of(
        cls, projected: dict[str, Tensor], num_captions: Tensor | None = None
    ) -> "StudentOutput":
        """From the flat dictionary that the student's `project` returns."""
        own = ("image_embeds", "text_embeds", "logit_scale")
        heads = {name: value for name, value in projected.items() if name not in own}
        values = {name: projected[name] for name in own}
        return cls(**values, heads=heads, num_captions=num_captions)


class LossTerm:
    """One term of the loss. A subclass is listed in terms.py and overrides the hooks that it needs;
    those here add nothing. `Stepper.step` calls them in the order in which they stand here; the two
    last ones are for checkpoints.

    A term with weight 0 is never made: it builds no module, draws no noise and costs nothing.

    Args:
        recipe: aclip.config.recipe.Recipe; a term keeps what it needs of it.

    Attributes:
        name: what the term is called everywhere; its weight is the recipe's `loss.<name>`.
        keys: what it adds to the recipe's section `loss`, `<name>` among them.
        section: a section of the recipe of its own, called `<name>`; None for none.
        aligns: whether it brings images and captions together. A recipe needs a term that does;
            the others are auxiliary.
        trains: the towers that it trains; with all of them locked the term is refused.
        reads_ssl_views: whether it reads views.ssl: views that keep all patches and are augmented
            strongly.
        reads_teacher_features: whether it reads Taught.features.
        reads_teacher_patches: whether it reads Taught.patches.
    """

    name: ClassVar[str]
    keys: ClassVar[type[Section]]
    section: ClassVar[type[Section] | None] = None
    aligns: ClassVar[bool] = False
    trains: ClassVar[tuple[str, ...]] = ("image", "text")
    reads_ssl_views: ClassVar[bool] = False
    reads_teacher_features: ClassVar[bool] = False
    reads_teacher_patches: ClassVar[bool] = False

    def __init__(self, recipe):
        self.weight: float = getattr(recipe.loss, self.name)

    @classmethod
    def check(cls, recipe) -> None:
        """Refuses a recipe in which the term has a weight and another part does not fit it.

        Raises:
            ValueError: one sentence with field, value and what to do.
        """

    def parts(self, student: nn.Module) -> dict[str, TermPart]:
        """The modules that the term adds, by their names in the student, which has its towers."""
        return {}

    def noise_shape(self, grid: int) -> tuple[int, ...] | None:
        """Shape of the uniform noise that the term wants with every sample; the worker draws it."""
        return None

    def statistic(
        self,
        taught: list[Taught],
        tokens: list[Tokens],
        to_device: Callable[[Tensor], Tensor],
    ) -> Tensor | None:
        """A statistic of the global batch that `inputs` reads. A collective: every rank calls, once
        a step.

        Args:
            taught: what the teacher made of each micro-batch.
            tokens: the captions of each, on the CPU.
            to_device: as in TermContext.
        """
        return None

    def inputs(self, context: TermContext) -> Any | None:
        """What `encode` reads of a micro-batch, on the student's device; no gradient."""
        return None

    def encode(self, student: nn.Module, inputs, features: dict[str, Tensor]) -> Tensor | None:
        """What the term computes of a micro-batch, besides the towers' features.

        Args:
            student: its towers and the term's own parts.
            inputs: models.student.StudentInput; `inputs.of_terms[name]` is the term's.
            features: image, text and ssl, as `project` gets them.

        Returns:
            (B, ...), which must not compare samples: micro-batches come one by one.
        """
        return None

    def project(self, student: nn.Module, features: dict[str, Tensor]) -> Tensor | None:
        """What the term's head makes of the features of the whole local batch.

        Args:
            features: image (B, V, C), text (B, W) or with N captions of an image (B, N, W), ssl
                (B, 2, C) if the recipe has such views, and under the term's name what `encode`
                gave.
        """
        return None

    def target(self, teacher: nn.Module, taught: list[Taught]) -> Tensor | None:
        """What the teacher gives for the whole local batch; no gradient. Needs a teacher."""
        return None

    def loss(self, output: StudentOutput, target: Tensor | None) -> Tensor:
        """The unweighted term, a scalar in fp32.

        Each rank returns the mean over its own rows against the columns of all ranks. The mean of
        the ranks' values is the global loss, and averaging the ranks' gradients gives its gradient.
        """
        raise NotImplementedError

    def state_dict(self) -> dict[str, Tensor]:
        """What the term counts from step to step, for checkpoints; the same on every rank."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Goes on from what `state_dict` gave, now on the CPU."""


class SampleTerm(LossTerm):
    """A term whose `encode` gives its value for each sample, (B,) fp32, of which it is the mean."""

    def project(self, student: nn.Module, features: dict[str, Tensor]) -> Tensor:
        # A new tensor: ZeRO-3 puts a hook on every output, and what `encode` gave has its own.
        return features[self.name] * 1

    def loss(self, output: StudentOutput, target: None) -> Tensor:
        return output.heads[self.name].mean()


def total(
    terms: tuple[LossTerm, ...], output: StudentOutput, targets: dict[str, Tensor | None]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of the terms.

    Args:
        terms: the terms that have a weight.
        output: what the student gives.
        targets: what each term's `target` gave, by the term's name.

    Returns:
        Scalar fp32 loss with gradient, and the unweighted, detached terms by name.
    """
    values = {term.name: term.loss(output, targets.get(term.name)) for term in terms}
    loss = sum(term.weight * values[term.name] for term in terms)
    return loss, {name: value.detach() for name, value in values.items()}


def by_view(head: nn.Module, features: Tensor) -> Tensor:
    """Runs a head on (B, V, C) as rows, since its BatchNorm spans all views."""
    return head(features.flatten(0, 1)).unflatten(0, features.shape[:2])


def transformer_blocks(width: int, num_layers: int) -> nn.Sequential:
    """A decoder's blocks, with heads of 64 channels where the width divides by them."""
    # Here, because timm takes seconds to import, and a recipe is read without it.
    from timm.models.vision_transformer import Block

    num_heads = max(1, width // 64)
    while width % num_heads:
        num_heads -= 1
    return nn.Sequential(
        *(Block(width, num_heads=num_heads, qkv_bias=True) for _ in range(num_layers))
    )


def trunc_normal(*shape: int) -> nn.Parameter:
    """A parameter drawn as ViTs draw their tokens: a truncated normal of deviation 0.02."""
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(shape), std=0.02))
