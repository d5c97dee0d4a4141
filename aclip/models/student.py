"""The student: both towers, their projections, the self-supervised heads and the logit scale."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from aclip.config import Recipe
from aclip.errors import ConfigError
from aclip.masking import Selection, count_kept_blocks
from aclip.models.heads import LogitScale, mlp_head
from aclip.models.text import TextTower
from aclip.models.vit import ImageTower


@dataclass
class StudentOutput:
    """What the losses read. B samples of this rank, V views, E embedding, D head outputs.

    Attributes:
        image_embeds: (B, V, E), unnormalised. text_embeds: (B, E), unnormalised.
        simclr_embeds: (B, V, D) or None. byol_predictions: (B, V, D) or None.
        logit_scale: (1,) fp32, the factor itself.
    """

    image_embeds: Tensor
    text_embeds: Tensor
    logit_scale: Tensor
    simclr_embeds: Tensor | None = None
    byol_predictions: Tensor | None = None


class Student(nn.Module):
    """Both towers and what stands behind them; a head whose loss has weight 0 is not built.

    Everything goes through `forward(task, ...)`, since DeepSpeed's engine calls nothing else:
    "encode" and "project" are the two halves of a training step, "encode_image" and "encode_text"
    are for evaluation.
    """

    def __init__(
        self,
        image: ImageTower,
        text: TextTower,
        embed_dim: int,
        simclr_widths: tuple[int, ...] | None = None,
        byol_widths: tuple[int, ...] | None = None,
    ):
        super().__init__()
        self.image = image
        self.text = text
        self.image_projection = nn.Linear(image.width, embed_dim, bias=False)
        self.text_projection = nn.Linear(text.width, embed_dim, bias=False)
        nn.init.normal_(self.image_projection.weight, std=image.width**-0.5)
        nn.init.normal_(self.text_projection.weight, std=text.width**-0.5)
        self.logit_scale = LogitScale()
        if simclr_widths:
            self.simclr_head = mlp_head([image.width, *simclr_widths])
        if byol_widths:
            self.byol_projector = mlp_head([image.width, *byol_widths])
            self.byol_predictor = mlp_head([byol_widths[-1], *byol_widths])

    def forward(self, task: str, *inputs):
        return getattr(self, task)(*inputs)

    def external_parameters(self) -> list[nn.Parameter]:
        """Parameters of the towers that are read outside the call of the module that owns them.

        ZeRO-3 leaves such a weight empty unless it is told. They are the student's to register,
        since every call enters through it, also one that uses another method of a tower.
        """
        return self.image.external_parameters() + self.text.external_parameters()

    def encode(
        self,
        pixels: Tensor,
        selection: Selection | None,
        tokens: Tensor,
        real_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Both towers: pixels (B, V, 3, R, R) normalised, tokens (B, L) and real_ids as in
        TextTower -> features (B, V, C), (B, W)."""
        image_features = self.image(pixels.flatten(0, 1), selection)
        return image_features.unflatten(0, pixels.shape[:2]), self.text(tokens, real_ids)

    def project(self, image_features: Tensor, text_features: Tensor) -> dict[str, Tensor]:
        """Projections and heads over the whole local batch: the fields of StudentOutput."""
        output = {
            "image_embeds": self.image_projection(image_features),
            "text_embeds": self.text_projection(text_features),
            "logit_scale": self.logit_scale(),
        }
        batch_and_views = image_features.shape[:2]
        rows = image_features.flatten(0, 1)
        if hasattr(self, "simclr_head"):
            output["simclr_embeds"] = self.simclr_head(rows).unflatten(0, batch_and_views)
        if hasattr(self, "byol_predictor"):
            predictions = self.byol_predictor(self.byol_projector(rows))
            output["byol_predictions"] = predictions.unflatten(0, batch_and_views)
        return output

    def encode_image(self, pixels: Tensor) -> Tensor:
        """(M, 3, R, R) normalised -> (M, E) unnormalised embeds, over all patches."""
        return self.image_projection(self.image(pixels))

    def encode_text(self, tokens: Tensor) -> Tensor:
        """(M, L) int64 -> (M, E) unnormalised embeds."""
        return self.text_projection(self.text(tokens))


def build_student(recipe: Recipe) -> Student:
    """Builds the student of a recipe; the same seed gives the same weights on every rank."""
    model, loss = recipe.model, recipe.loss
    torch.manual_seed(recipe.train.seed)
    if model.text.width % model.text.heads:
        raise ConfigError(
            f"model.text.heads is {model.text.heads}, which does not divide model.text.width "
            f"{model.text.width}; change one of them"
        )
    image = ImageTower(**model.image.model_dump(), compile=model.compile)
    _check_mask(recipe, image)
    return Student(
        image,
        TextTower(**model.text.model_dump(), compile=model.compile),
        model.embed_dim,
        simclr_widths=loss.simclr_widths if loss.simclr > 0 else None,
        byol_widths=loss.byol_widths if loss.byol > 0 else None,
    )


def kept_blocks(recipe: Recipe, grid: int) -> int:
    """How many blocks of a student view with `grid` patches per side the recipe keeps."""
    return count_kept_blocks(grid, recipe.mask.block_size, recipe.mask.keep_ratio)


def _check_mask(recipe: Recipe, image: ImageTower) -> None:
    if recipe.mask.policy != "none" and image.grid % recipe.mask.block_size:
        raise ConfigError(
            f"mask.block_size is {recipe.mask.block_size}, which does not divide the {image.grid} "
            f"patches per side of a {recipe.model.image.resolution} px view; choose a divisor"
        )
    patch = image.vit.patch_embed.patch_size[0]
    if recipe.teacher is not None and recipe.teacher.resolution % patch:
        raise ConfigError(
            f"teacher.resolution is {recipe.teacher.resolution}, which patches of {patch} px do "
            "not "
            "divide; choose a multiple"
        )
