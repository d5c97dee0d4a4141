"""The student: both towers, their projections, the self-supervised heads and the logit scale."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from aclip.config.recipe import Recipe
from aclip.errors import ConfigError
from aclip.method import losses
from aclip.method.masking import Selection
from aclip.models.decoders import Codewords, PatchDecoder, TextDecoder
from aclip.models.heads import LogitScale, mlp_head
from aclip.models.text import VOCAB_SIZE, TextTower
from aclip.models.vit import ImageTower


@dataclass(frozen=True)
class DistillInput:
    """Masked self-distillation of the first student view. K kept and M masked patches.

    Attributes:
        selection: keeps the visible patches. masked_ids: (B, M) int64, the others.
        targets: (B, M, D), what the decoder's head should give; no gradient.
    """

    selection: Selection
    masked_ids: Tensor
    targets: Tensor


@dataclass(frozen=True)
class MlmInput:
    """The T masked tokens of a batch of captions.

    Attributes:
        masked: (B, L) bool.
        ids: (T,) int64 flat positions of the masked tokens, labels: (T,) int64 what they were.
        rows, weights: (T,), see losses.mlm.
    """

    masked: Tensor
    ids: Tensor
    labels: Tensor
    rows: Tensor
    weights: Tensor


@dataclass(frozen=True)
class StudentInput:
    """What the student reads of a micro-batch; parts that the recipe leaves out are None.

    Attributes:
        pixels: (B, V, 3, R, R) normalised. selection: of the kept patches, None for all.
        tokens: (B, L) int64. real_ids: (T,) int64, models.text.real_token_ids(tokens).
        ssl_pixels: (B, 2, 3, R, R) normalised, for SimCLR.
    """

    pixels: Tensor
    selection: Selection | None
    tokens: Tensor
    real_ids: Tensor
    ssl_pixels: Tensor | None = None
    distill: DistillInput | None = None
    mlm: MlmInput | None = None


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

    def add_distillation(
        self, targets: str, num_layers: int, num_codewords: int, temperature: float
    ) -> None:
        """Builds the decoder of masked self-distillation; see DistillConfig."""
        width, patch = self.image.width, self.image.patch_size
        if targets == "codewords":
            # Also the teacher's, so the student owns it and not the decoder.
            self.codewords = Codewords(width, num_codewords)
            head = nn.Linear(width, width)
        else:
            head = nn.Linear(width, width if targets == "features" else 3 * patch**2)
        self.distill_decoder = PatchDecoder(width, self.image.grid**2, num_layers, head)
        self.distill_temperature = temperature

    def add_mlm(self, num_layers: int) -> None:
        """Builds the decoder of masked language modelling."""
        self.mlm_mask_token = nn.Parameter(torch.empty(self.text.width))
        nn.init.trunc_normal_(self.mlm_mask_token, std=0.02)
        self.mlm_decoder = TextDecoder(self.text.width, num_layers, VOCAB_SIZE)

    def external_parameters(self) -> list[nn.Parameter]:
        """Parameters of the towers that are read outside the call of the module that owns them.

        ZeRO-3 leaves such a weight empty unless it is told. They are the student's to register,
        since every call enters through it, also one that uses another method of a tower.
        """
        return self.image.external_parameters() + self.text.external_parameters()

    def forward(self, task: str, *inputs):
        return getattr(self, task)(*inputs)

    def encode(self, inputs: StudentInput) -> dict[str, Tensor]:
        """The towers' part of a step, which compares no samples.

        Returns:
            image (B, V, C) and text (B, W) features; where the recipe has them ssl (B, 2, C)
            features and the per-sample losses distill (B,) and mlm (B,).
        """
        batch_and_views = inputs.pixels.shape[:2]
        image_features = self.image(inputs.pixels.flatten(0, 1), inputs.selection)
        features = {
            "image": image_features.unflatten(0, batch_and_views),
            "text": self.text(inputs.tokens, inputs.real_ids),
        }
        if inputs.ssl_pixels is not None:
            ssl_features = self.image(inputs.ssl_pixels.flatten(0, 1))
            features["ssl"] = ssl_features.unflatten(0, inputs.ssl_pixels.shape[:2])
        if inputs.distill is not None:
            features["distill"] = self._distill(inputs.pixels[:, 0], inputs.distill)
        if inputs.mlm is not None:
            features["mlm"] = self._mlm(inputs.tokens, inputs.real_ids, inputs.mlm)
        return features

    def _distill(self, pixels: Tensor, distill: DistillInput) -> Tensor:
        tokens, keep_ids = self.image.forward_patches(pixels, distill.selection)
        predictions = self.distill_decoder(tokens, keep_ids, distill.masked_ids)
        if not hasattr(self, "codewords"):
            return losses.reconstruct(predictions, distill.targets)
        return losses.distill(
            self.codewords(predictions), distill.targets, self.distill_temperature
        )

    def _mlm(self, tokens: Tensor, real_ids: Tensor, mlm: MlmInput) -> Tensor:
        features = self.text.forward_tokens(tokens, mlm.masked, self.mlm_mask_token, real_ids)
        is_real = torch.zeros_like(mlm.masked).flatten().index_fill(0, real_ids, True)
        logits = self.mlm_decoder(features, is_real.view_as(tokens), mlm.ids)
        return losses.mlm(logits, mlm.labels, mlm.rows, mlm.weights, len(tokens))

    def project(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Projections and heads over the whole local batch: the fields of StudentOutput."""
        output = {
            "image_embeds": self.image_projection(features["image"]),
            "text_embeds": self.text_projection(features["text"]),
            "logit_scale": self.logit_scale(),
        }
        if hasattr(self, "simclr_head"):
            compared = features.get("ssl", features["image"])
            output["simclr_embeds"] = _by_view(self.simclr_head, compared)
        if hasattr(self, "byol_predictor"):
            projected = _by_view(self.byol_projector, features["image"])
            output["byol_predictions"] = _by_view(self.byol_predictor, projected)
        # A new tensor each: ZeRO-3 hooks an output's backward pass, which an input has had.
        output |= {name: features[name] * 1 for name in ("distill", "mlm") if name in features}
        return output

    def encode_image(self, pixels: Tensor) -> Tensor:
        """(M, 3, R, R) normalised -> (M, E) unnormalised embeds, over all patches."""
        return self.image_projection(self.image(pixels))

    def encode_text(self, tokens: Tensor) -> Tensor:
        """(M, L) int64 -> (M, E) unnormalised embeds."""
        return self.text_projection(self.text(tokens))


def _by_view(head: nn.Module, features: Tensor) -> Tensor:
    """Runs a head on (B, V, C) as rows, since its BatchNorm spans all views."""
    return head(features.flatten(0, 1)).unflatten(0, features.shape[:2])


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
    student = Student(
        image,
        TextTower(**model.text.model_dump(), compile=model.compile),
        model.embed_dim,
        simclr_widths=loss.simclr_widths if loss.simclr > 0 else None,
        byol_widths=loss.byol_widths if loss.byol > 0 else None,
    )
    if loss.distill > 0:
        config = recipe.distill
        student.add_distillation(
            config.targets, config.decoder_layers, config.num_codewords, config.student_temperature
        )
    if loss.mlm > 0:
        student.add_mlm(recipe.mlm.decoder_layers)
    return student


def _check_mask(recipe: Recipe, image: ImageTower) -> None:
    if recipe.mask.policy != "none" and image.grid % recipe.mask.block_size:
        raise ConfigError(
            f"mask.block_size is {recipe.mask.block_size}, which does not divide the {image.grid} "
            f"patches per side of a {recipe.model.image.resolution} px view; choose a divisor"
        )
    patch = image.patch_size
    if recipe.teacher is not None and recipe.teacher.resolution % patch:
        raise ConfigError(
            f"teacher.resolution is {recipe.teacher.resolution}, which patches of {patch} px do "
            "not "
            "divide; choose a multiple"
        )


TRAINING_ONLY = (
    "simclr_head",
    "byol_predictor",
    "logit_scale",
    "distill_decoder",
    "mlm_mask_token",
    "mlm_decoder",
)
