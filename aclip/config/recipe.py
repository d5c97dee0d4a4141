"""The recipe: everything that defines a run but what the ds_config owns (precision, micro-batch).

A recipe is YAML checked against the sections that are put together here (recipe_file.py reads it).
What a term of the loss or a mask policy adds stands in its own file of aclip/method/.
"""

from typing import Any, Literal

from pydantic import Field, create_model, model_validator

from aclip.config.combinations import check_combination
from aclip.config.optimizer import OptimizerConfig
from aclip.config.sections import (
    AugmentConfig,
    CaptionKeys,
    DataConfig,
    ModelConfig,
    SslColorConfig,
    TeacherConfig,
    TextConfig,
    TrainConfig,
    ViewsConfig,
)
from aclip.method.losses.term import LossTerm
from aclip.method.losses.terms import TERMS
from aclip.method.masks.keep_ratio import KeepRatioShape
from aclip.method.masks.policies import POLICIES
from aclip.method.masks.policy import MaskPolicy
from aclip.method.schedules import count_steps
from aclip.method.teaching import Teaching
from aclip.section import Section


class CommonMaskKeys(Section):
    """The keys of the section `mask` that every policy has."""

    policy: Literal[tuple(POLICIES)] = "attentive"
    """Which blocks are kept, a policy of aclip/method/masks: those that the teacher attends to
    (attentive), the others (inverse), any (random), the middle (gaussian), those that look like no
    random anchor (cluster), all (none)."""
    keep_ratio: float = Field(0.5, gt=0, le=1)
    """Share of the blocks that is kept, rounded up: 0.5 of 49 is 25."""
    keep_ratio_end: float | None = Field(None, gt=0, le=1)
    """Where keep_ratio has gone to when the run, or its stage, ends; empty for a constant one."""
    keep_ratio_shape: KeepRatioShape = "linear"
    """How it goes there with the samples seen: linear, or on half a wave of a cosine."""
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


class MaskConfig(*(policy.keys for policy in POLICIES.values() if policy.keys), CommonMaskKeys):
    """Which patches the student sees: the common keys, and those that single policies add."""


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
    text: TextConfig = TextConfig()
    views: ViewsConfig = ViewsConfig()
    augment: AugmentConfig = AugmentConfig()
    ssl_augment: SslColorConfig = SslColorConfig()
    mask: MaskConfig = MaskConfig()
    teacher: TeacherConfig | None = None
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    stages: list[dict[str, Any]] = []
    """What follows when the epochs are done: stages of the same run, each as the keys that it
    changes of the stage before it, with a length of its own; see config/stages.py."""

    @property
    def terms(self) -> tuple[LossTerm, ...]:
        """The terms of the loss that have a weight, in the order of TERMS."""
        return tuple(term(self) for term in self.weighted_terms)

    @property
    def caption_tokens(self) -> int:
        """The most tokens of a caption in training, start and end included."""
        return self.text.tokens or self.model.text.context_length

    @property
    def caption_keys(self) -> list[CaptionKeys]:
        """The keys of captions of each source, or of the only one; see data.captions."""
        data = self.data
        return [each.captions or data.captions for each in data.sources] or [data.captions]

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
        return any(term.reads_teacher_features for term in self.terms)

    @property
    def needs_teacher_patches(self) -> bool:
        """Whether the teacher also reads the first student view, all patches of it."""
        return any(term.reads_teacher_patches for term in self.terms)

    @property
    def keeps_scores(self) -> bool:
        """Whether the teacher's scores are kept for later epochs, see teacher.reuse."""
        return self.teacher is not None and self.teacher.reuse > 1

    def num_steps(self, num_samples: float) -> int:
        """The optimizer steps of the run, or of its stage.

        Args:
            num_samples: samples of an epoch.
        """
        train = self.train
        epochs = train.epochs if train.samples is None else train.samples / num_samples
        return count_steps(epochs, num_samples, train.global_batch_size)

    def teaching(self, num_samples: int) -> Teaching:
        """When the teacher scores its view; for a recipe that needs one.

        Args:
            num_samples: samples of an epoch.
        """
        train, mask = self.train, self.mask
        return Teaching(
            num_samples,
            train.global_batch_size,
            self.num_steps(num_samples),
            reuse=self.teacher.reuse if self.keeps_scores else 1,
            warmup=mask.warmup,
            is_blind=mask.warmup_change == "at_once" and not self.needs_teacher_features,
        )

    @property
    def needs_teacher(self) -> bool:
        return self.needs_teacher_view or self.needs_teacher_patches

    @property
    def average_momentum(self) -> float | None:
        """The momentum at the first step of the teacher's average, or of train.average; None where
        the run keeps no average of the weights."""
        return self.teacher.momentum if self.teacher is not None else self.train.average or None

    @property
    def weighted_terms(self) -> list[type[LossTerm]]:
        """The classes of `terms`."""
        return [term for term in TERMS if getattr(self.loss, term.name) > 0]

    @model_validator(mode="after")
    def _check_combination(self) -> "Recipe":
        check_combination(self)
        return self
