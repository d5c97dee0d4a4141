"""The recipe: everything that defines a run but what the ds_config owns (precision, micro-batch).

A recipe is YAML checked against the sections that are put together here (recipe_file.py reads it).
What a term of the loss adds stands in the term's own file of aclip/method/losses/.
"""

from typing import Literal

from pydantic import Field, create_model, model_validator

from aclip.config.sections import (
    AugmentConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    SslColorConfig,
    TeacherConfig,
    TextTowerConfig,
    TrainConfig,
    ViewsConfig,
)
from aclip.method.losses.term import LossTerm
from aclip.method.losses.terms import TERMS
from aclip.method.masks.policies import POLICIES
from aclip.method.masks.policy import MaskPolicy
from aclip.method.schedules import count_steps
from aclip.method.teaching import Teaching
from aclip.section import Section


class MaskConfig(Section):
    policy: Literal[tuple(POLICIES)] = "attentive"
    """Which blocks are kept, a policy of aclip/method/masks: those that the teacher attends to
    (attentive), the others (inverse), any (random), the middle (gaussian), all (none)."""
    keep_ratio: float = Field(0.5, gt=0, le=1)
    """Share of the blocks that is kept, rounded up: 0.5 of 49 is 25."""
    block_size: int = Field(2, ge=1)
    """A block is block_size x block_size patches."""
    warmup: float = Field(0.0, ge=0, lt=1)
    """Share of the run in which a mask that goes by the teacher's scores (attentive, inverse) does
    not trust them yet. An untrained teacher may look past the objects; then the student never sees
    them, and the teacher does not learn to look."""
    warmup_change: Literal["at_once", "gradual"] = "at_once"
    """Until the warm-up is over, blocks are kept at random (at_once), or by the rank of their score
    mixed with noise, whose weight falls from 1 to 0 (gradual)."""
    temperature: float = Field(0.0, ge=0, le=100)
    """Above 0, blocks are drawn by the teacher's scores once the warm-up is over, so that an image
    does not always keep the same ones: without replacement, with odds of score ** (1 / temperature)
    or, if the mask is inverse, score ** (-1 / temperature). 0 keeps the best."""


class LossConfig(*(term.keys for term in reversed(TERMS))):  # pydantic takes the last base first
    """Weights of the loss terms; a term with weight 0 builds no module and costs nothing."""

    initial_logit_scale: float = Field(1 / 0.07, gt=0)
    """What the inverse of the temperature starts at."""
    max_logit_scale: float = Field(100.0, gt=1)
    """What the inverse of the temperature is clamped to."""


OfTerms = create_model(
    "OfTerms",
    __base__=Section,
    **{term.name: (term.section, term.section()) for term in TERMS if term.section is not None},
)
"""The sections that terms of the loss have of their own."""


class Recipe(OfTerms):
    """One run's method, data and schedule."""

    description: str = ""
    model: ModelConfig = ModelConfig()
    views: ViewsConfig = ViewsConfig()
    augment: AugmentConfig = AugmentConfig()
    ssl_augment: SslColorConfig = SslColorConfig()
    mask: MaskConfig = MaskConfig()
    teacher: TeacherConfig | None = None
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()

    @property
    def terms(self) -> tuple[LossTerm, ...]:
        """The terms of the loss that have a weight, in the order of TERMS."""
        return tuple(term(self) for term in self._weighted())

    @property
    def mask_policy(self) -> MaskPolicy:
        return POLICIES[self.mask.policy]

    @property
    def needs_mask_noise(self) -> bool:
        """Whether the data workers draw noise for the mask."""
        return self.mask_policy.reads_noise or self.mask.warmup > 0 or self.mask.temperature > 0

    @property
    def needs_teacher_view(self) -> bool:
        """Whether the teacher reads a view of its own, which contains the student's."""
        return self.mask_policy.reads_teacher or self.needs_teacher_features

    @property
    def needs_teacher_features(self) -> bool:
        """Whether a loss reads the features of the teacher view; the mask reads its scores."""
        return any(term.reads_teacher_view for term in self.terms)

    @property
    def needs_teacher_patches(self) -> bool:
        """Whether the teacher also reads the first student view, all patches of it."""
        return any(term.reads_teacher_patches for term in self.terms)

    @property
    def keeps_scores(self) -> bool:
        """Whether the teacher's scores are kept for later epochs, see teacher.reuse."""
        return self.teacher is not None and self.teacher.reuse > 1

    def teaching(self, num_samples: int) -> Teaching:
        """When the teacher scores its view; for a recipe that needs one.

        Args:
            num_samples: samples of an epoch.
        """
        train, mask = self.train, self.mask
        return Teaching(
            num_samples,
            train.global_batch_size,
            count_steps(train.epochs, num_samples, train.global_batch_size),
            reuse=self.teacher.reuse if self.keeps_scores else 1,
            warmup=mask.warmup,
            is_blind=mask.warmup_change == "at_once" and not self.needs_teacher_features,
        )

    @property
    def needs_teacher(self) -> bool:
        return self.needs_teacher_view or self.needs_teacher_patches

    def _weighted(self) -> list[type[LossTerm]]:
        return [term for term in TERMS if getattr(self.loss, term.name) > 0]

    @model_validator(mode="after")
    def _check_combination(self) -> "Recipe":
        self._check_terms()
        self._check_mask()
        self._check_teacher()
        self._check_reuse()
        self._check_views()
        self._check_text()
        for part in ("augment", "ssl_augment"):
            low, high = getattr(self, part).blur_sigma
            if low > high:
                raise ValueError(
                    f"{part}.blur_sigma is [{low:g}, {high:g}]; give the lower one first"
                )
        if self.data.train and self.data.sources:
            raise ValueError(
                f"data.train is {self.data.train} and data.sources holds "
                f"{len(self.data.sources)} sources; give one of the two, e.g. data.train=[]"
            )
        return self

    def _check_text(self) -> None:
        text, default = self.model.text, TextTowerConfig()
        if not text.name:
            for key in ("pretrained", "pooling"):
                if getattr(text, key) != getattr(default, key):
                    raise ValueError(
                        f"model.text.{key} is {str(getattr(text, key)).lower()}, but model.text."
                        "name is empty; name a folder, or remove the key"
                    )
            return
        for key in ("width", "heads", "layers"):
            if getattr(text, key) != getattr(default, key):
                raise ValueError(
                    f"model.text.{key} is {getattr(text, key)}, but the model in model.text.name "
                    f"{text.name} has its own; remove the key"
                )
        if text.recompute == "elementwise":
            raise ValueError(
                f"model.text.recompute is elementwise, which the model in model.text.name "
                f"{text.name} can't; take blocks or none"
            )
        if self.model.compile:
            raise ValueError(
                f"model.compile is true, but model.text.name is {text.name}, whose model is not "
                "compiled; set model.compile=false"
            )

    def _check_terms(self) -> None:
        if not any(term.aligns for term in self._weighted()):
            weights = " and ".join(f"loss.{term.name} is 0" for term in TERMS if term.aligns)
            raise ValueError(
                f"{weights}, so that nothing brings images and captions together; give "
                "loss.contrastive a weight"
            )
        for term in self._weighted():
            term.check(self)

    def _check_mask(self) -> None:
        for name in ("warmup", "temperature"):
            value = getattr(self.mask, name)
            if value and not self.mask_policy.reads_teacher:
                raise ValueError(
                    f"mask.{name} is {value:g}, but mask.policy {self.mask.policy} does not go by "
                    f"the teacher's scores; set mask.{name}=0, or mask.policy to attentive or "
                    "inverse"
                )

    def _check_teacher(self) -> None:
        readers = [f"mask.policy {self.mask.policy}"] if self.mask_policy.reads_teacher else []
        readers += [
            f"loss.{term.name} {term.weight:g}"
            for term in self.terms
            if term.reads_teacher_view or term.reads_teacher_patches
        ]
        if readers and self.teacher is None:
            raise ValueError(
                f"teacher is empty, but {' and '.join(readers)} needs one; set "
                "teacher.resolution, or mask.policy to none or random and such losses to 0"
            )
        if self.teacher is None:
            return
        resolution = self.teacher.resolution
        if not readers:
            raise ValueError(
                f"teacher.resolution is {resolution}, but neither mask.policy {self.mask.policy} "
                "nor a loss uses a teacher; set teacher=null"
            )
        if not self.needs_teacher_view and resolution != self.model.image.resolution:
            raise ValueError(
                f"teacher.resolution is {resolution}, but {' and '.join(readers)} alone lets the "
                "teacher read the student's view; set it to model.image.resolution "
                f"{self.model.image.resolution}"
            )
        score_layers = self.teacher.score_layers
        if score_layers is not None and not self.mask_policy.reads_teacher:
            raise ValueError(
                f"teacher.score_layers is {score_layers}, but mask.policy {self.mask.policy} reads "
                "no scores; remove the key"
            )

    def _check_reuse(self) -> None:
        if not self.keeps_scores:
            return
        reuse = f"teacher.reuse is {self.teacher.reuse}"
        if not self.mask_policy.reads_teacher:
            raise ValueError(
                f"{reuse}, but mask.policy {self.mask.policy} reads no scores of the teacher that "
                "could be kept; set teacher.reuse to 1, or mask.policy to attentive or inverse"
            )
        for term in self.terms:
            if term.reads_teacher_view or term.reads_teacher_patches:
                raise ValueError(
                    f"{reuse}, but loss.{term.name} {term.weight:g} needs the teacher in every "
                    f"step; set teacher.reuse to 1, or loss.{term.name} to 0"
                )
        if self.data.sources:
            raise ValueError(
                f"{reuse}, but data.sources holds {len(self.data.sources)} sources, whose samples "
                "do not come once an epoch each; set teacher.reuse to 1, or give one data set as "
                "data.train"
            )

    def _check_views(self) -> None:
        views = self.views
        if views.ssl and not any(term.reads_ssl_views for term in self._weighted()):
            raise ValueError(
                f"views.ssl is {views.ssl} with loss.simclr 0, so that no loss reads these views; "
                "set views.ssl to 0 or give loss.simclr a weight"
            )
        for name in ("scale", "ssl_scale"):
            low, high = getattr(views, name)
            if not 0 < low <= high <= 1:
                raise ValueError(
                    f"views.{name} is [{low:g}, {high:g}]; give two shares of the area with "
                    "0 < low <= high <= 1"
                )
