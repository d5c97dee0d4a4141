"""The student: both towers, their projections, the self-supervised heads and the logit scale."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from aclip.config.recipe import Recipe
from aclip.errors import ConfigError
from aclip.method.losses.heads import ExactScalar, LogitScale
from aclip.method.losses.term import LossTerm, TermPart
from aclip.method.masks.policy import Selection
from aclip.method.tokens import Tokens
from aclip.models.folder_text import FolderTextTower
from aclip.models.text import TextTower, build_text_tower
from aclip.models.vit import ImageTower


@dataclass(frozen=True)
class StudentInput:
    """What the student reads of a micro-batch; parts that the recipe leaves out are None.

    Attributes:
        pixels: (B, V, 3, R, R) normalised.
        selection: which patches are kept; None for all.
        tokens: the captions of B images, located.
        ssl_pixels: (B, 2, 3, R, R) normalised.
        of_terms: what each loss term reads besides, by the term's name.
    """

    pixels: Tensor
    selection: Selection | None
    tokens: Tokens
    ssl_pixels: Tensor | None = None
    of_terms: dict[str, Any] = field(default_factory=dict)


class Student(nn.Module):
    """Both towers, their projections, and what the loss terms add to them.

    Everything goes through `forward(task, ...)`, since DeepSpeed's engine calls nothing else:
    "encode" and "project" are the two halves of a training step, "encode_image" and "encode_text"
    are for evaluation.

    Args:
        image, text: the towers.
        embed_dim: E, the size of the joint embedding.
        logit_scale: the learned inverse temperature.
        terms: the loss terms that are trained; their modules are drawn in this order.

    Attributes:
        terms: the loss terms that are trained.
        model_parts: names of the attributes that are the model itself, which is exported; the rest
            exists only during training.
        averaged_parts: names of the attributes whose average the teacher holds.
    """

    def __init__(
        self,
        image: ImageTower,
        text: TextTower | FolderTextTower,
        embed_dim: int,
        logit_scale: LogitScale,
        terms: tuple[LossTerm, ...] = (),
    ):
        super().__init__()
        self.image = image
        self.text = text
        self.image_projection = nn.Linear(image.width, embed_dim, bias=False)
        self.text_projection = nn.Linear(text.width, embed_dim, bias=False)
        nn.init.normal_(self.image_projection.weight, std=image.width**-0.5)
        nn.init.normal_(self.text_projection.weight, std=text.width**-0.5)
        self.model_parts = {"image", "text", "image_projection", "text_projection"}
        self.averaged_parts = set(self.model_parts)
        self._add("logit_scale", TermPart(logit_scale, exported=True))
        self.terms = terms
        for term in terms:
            for name, part in term.parts(self).items():
                self._add(name, part)

    def _add(self, name: str, part: TermPart) -> None:
        setattr(self, name, part.module)
        if part.exported:
            self.model_parts.add(name)
        if part.averaged:
            self.averaged_parts.add(name)

    def keep_parts(self, names: set[str]) -> None:
        """Removes every attribute that is not named: for evaluation, or the teacher's copy."""
        for name in [*self._modules, *self._parameters]:
            if name not in names:
                delattr(self, name)
        self.terms = ()

    def model_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of the model itself, by name."""
        return {name: p for name, p in self.named_parameters() if self.is_of_model(name)}

    def is_of_model(self, name: str) -> bool:
        """Whether a parameter of this name belongs to the model, and not to training alone."""
        return name.partition(".")[0] in self.model_parts

    def exact_scalars(self) -> dict[str, ExactScalar]:
        """The learned numbers that the forward pass reads in fp32, by their parameters' names."""
        return {
            f"{name}.{module.parameter_name}": module
            for name, module in self.named_modules()
            if isinstance(module, ExactScalar)
        }

    def external_parameters(self) -> list[nn.Parameter]:
        """Parameters of the towers that are read outside the call of the module that owns them.

        ZeRO-3 leaves such a weight empty unless it is told. The student registers them, since every
        call enters through it, also one that uses another method of a tower.
        """
        return self.image.external_parameters() + self.text.external_parameters()

    def forward(self, task: str, *inputs):
        """Does a task, which is a public method's name: encode, project, encode_image, ..."""
        return getattr(self, task)(*inputs)

    def encode(self, inputs: StudentInput) -> dict[str, Tensor]:
        """The towers' part of a step, which compares no samples.

        Returns:
            image (B, V, C) and text (B, W) features, with N captions of an image (B, N, W); where
            the recipe has such views ssl (B, 2, C) features; and what each term's `encode` gives,
            by the term's name.
        """
        batch_and_views = inputs.pixels.shape[:2]
        image_features = self.image(inputs.pixels.flatten(0, 1), inputs.selection)
        text_features = self.text(inputs.tokens)
        if inputs.tokens.num_captions is not None:
            text_features = text_features.unflatten(0, (len(inputs.tokens), -1))
        features = {
            "image": image_features.unflatten(0, batch_and_views),
            "text": text_features,
        }
        if inputs.ssl_pixels is not None:
            ssl_features = self.image(inputs.ssl_pixels.flatten(0, 1))
            features["ssl"] = ssl_features.unflatten(0, inputs.ssl_pixels.shape[:2])
        of_terms = {term.name: term.encode(self, inputs, features) for term in self.terms}
        return features | _present(of_terms)

    def encode_and_project(
        self, inputs: StudentInput, before: list[dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """`encode` of a step's last micro-batch and `project` of the whole local batch.

        One call, since ZeRO-3 plans ahead what it gathers from one call of the student to the next.

        Args:
            inputs: the last micro-batch.
            before: the features of those before it.
        """
        features = self.encode(inputs)
        if before:
            everything = [*before, features]
            features = {name: torch.cat([part[name] for part in everything]) for name in features}
        return self.project(features)

    def project(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Projections and the terms' heads over the whole local batch; see StudentOutput.of."""
        output = {
            "image_embeds": self.image_projection(features["image"]),
            "text_embeds": self.text_projection(features["text"]),
            "logit_scale": self.logit_scale(),
        }
        of_terms = {term.name: term.project(self, features) for term in self.terms}
        return output | _present(of_terms)

    def encode_image(self, pixels: Tensor, selection: Selection | None = None) -> Tensor:
        """(M, 3, R, R) normalised -> (M, E) unnormalised embeds, over all patches or kept ones."""
        return self.image_projection(self.image(pixels, selection))

    def encode_text(self, tokens: Tokens) -> Tensor:
        """M captions -> (M, E) unnormalised embeds."""
        return self.text_projection(self.text(tokens))


def _present(values: dict[str, Tensor | None]) -> dict[str, Tensor]:
    return {name: value for name, value in values.items() if value is not None}


def build_student(recipe: Recipe, for_training: bool = True) -> Student:
    """Builds the student of a recipe; the same seed gives the same weights on every rank.

    Args:
        for_training: whether the loss terms add their parts; otherwise it is the model alone, not
            compiled.

    Raises:
        ConfigError: the towers can't be built so.
    """
    model = recipe.model
    torch.manual_seed(recipe.train.seed)
    compile = model.compile and for_training
    image = ImageTower(**model.image.model_dump(), compile=compile)
    _check_with_tower(recipe, image)
    student = Student(
        image,
        build_text_tower(model.text, compile),
        model.embed_dim,
        LogitScale(recipe.loss.initial_logit_scale, recipe.loss.max_logit_scale),
        recipe.terms,
    )
    for tower in recipe.optimizer.locked_towers:
        getattr(student, tower).requires_grad_(False)
    if not for_training:
        student.keep_parts(student.model_parts)
    return student


def _check_with_tower(recipe: Recipe, image: ImageTower) -> None:
    """Refuses a mask or a teacher that does not fit the image tower, which only the built tower
    can tell.

    Raises:
        ConfigError: one sentence with field, value and what to do.
    """
    if recipe.mask.policy != "none" and image.grid % recipe.mask.block_size:
        raise ConfigError(
            f"mask.block_size is {recipe.mask.block_size}, which does not divide the {image.grid} "
            f"patches per side of a {recipe.model.image.resolution} px view; choose a divisor"
        )
    if recipe.teacher is None:
        return
    if recipe.mask_policy.reads_teacher and not image.has_scores:
        raise ConfigError(
            f"mask.policy is {recipe.mask.policy}, but the image tower pools by {image.pooling}, "
            "so that no query attends to the patches and could score them; take a mask without a "
            "teacher, or a tower with a CLS token or an attention pool"
        )
    if recipe.teacher.score_layers is not None and image.pooling == "map":
        raise ConfigError(
            f"teacher.score_layers is {recipe.teacher.score_layers}, but the image tower's scores "
            "are the attention of the pool behind its last block; remove the key"
        )
    patch, depth = image.patch_size, len(image.vit.blocks)
    if recipe.teacher.resolution % patch:
        raise ConfigError(
            f"teacher.resolution is {recipe.teacher.resolution}, which patches of {patch} px do "
            "not divide; choose a multiple"
        )
    if (recipe.teacher.score_layers or 0) > depth:
        raise ConfigError(
            f"teacher.score_layers is {recipe.teacher.score_layers}, but the image tower has "
            f"{depth} blocks; give {depth} or less"
        )
