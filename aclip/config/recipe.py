"""The recipe: everything that defines a run but what the ds_config owns (precision, micro-batch).

A recipe is YAML checked against the models below (aclip/recipe_file.py reads it). Modules of aclip
take plain arguments; only the builders read a Recipe.
"""

from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[float, Field(gt=0)]
Strength = Annotated[float, Field(ge=0)]
Recompute = Literal["none", "elementwise", "blocks"]
HueShift = Annotated[float, Field(ge=0, le=0.5)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Width = Annotated[int, Field(gt=0)]


class Part(BaseModel):
    """A frozen section of the recipe that refuses unknown keys."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )


class ImageTowerConfig(Part):
    name: str = "vit_base_patch16_224"
    """Any timm VisionTransformer with a CLS token and learned positions."""
    resolution: int = Field(224, gt=0)
    """Side of a student view, pixels; overrides the size in the name."""
    kwargs: dict[str, Any] = {}
    """More keyword arguments for timm, e.g. {embed_dim: 192, depth: 3, num_heads: 3}."""
    freeze_patch_embed: bool = True
    """Patch embedding stays at its initialisation (MoCo v3), in student and teacher."""
    recompute: Recompute = "none"
    """What the backward pass computes again to save memory: elementwise (norms and activations,
    about a third less, cheap) or blocks (all of each block, far less, a third more time)."""


class TextTowerConfig(Part):
    width: int = Field(512, gt=0)
    heads: int = Field(8, gt=0)
    layers: int = Field(12, gt=0)
    context_length: int = Field(77, ge=3)
    """Tokens of a caption, start and end included; longer captions are cut, the end token stays."""
    recompute: Recompute = "none"


class ModelConfig(Part):
    image: ImageTowerConfig = ImageTowerConfig()
    text: TextTowerConfig = TextTowerConfig()
    embed_dim: int = Field(512, gt=0)
    """Size of the joint embedding."""
    init: str = ""
    """Weights that a new run starts from, student and teacher: see README, Export and import."""
    compile: bool = False
    """torch.compile of the towers' blocks. On a GPU in bf16 a step waits for memory more than for
    matrix products; the compiler fuses norms, activations and residuals, which move most of it. The
    first step takes minutes longer. Not with ZeRO stage 3."""


class ViewsConfig(Part):
    student: int = Field(2, ge=1, le=2)
    """Views of an image that the student contrasts with the caption."""
    scale: tuple[float, float] = (0.5, 1.0)
    """Area of a student view as a share of the image, RandomResizedCrop's `scale`."""
    ssl: Literal[0, 2] = 0
    """Views with all patches and strong augmentation that SimCLR compares, as in SLIP; with 0 it
    compares the student views."""
    ssl_scale: tuple[float, float] = (0.08, 1.0)
    ssl_flip_prob: float = Field(0.5, ge=0, le=1)


class ColorConfig(Part):
    """How the colours of a view are changed."""

    jitter: tuple[Strength, Strength, Strength, HueShift] = (0.4, 0.4, 0.2, 0.1)
    """ColorJitter's brightness, contrast, saturation, hue."""
    jitter_prob: float = Field(0.8, ge=0, le=1)
    grayscale_prob: float = Field(0.2, ge=0, le=1)
    blur_sigma: tuple[Positive, Positive] = (0.1, 2.0)
    """Range of the Gaussian's standard deviation, pixels."""
    blur_prob: float = Field(0.1, ge=0, le=1)
    solarize_prob: float = Field(0.2, ge=0, le=1)


class SslColorConfig(ColorConfig):
    """Colours of the SSL views, SLIP's."""

    jitter: tuple[Strength, Strength, Strength, HueShift] = (0.4, 0.4, 0.4, 0.1)
    blur_prob: float = Field(0.5, ge=0, le=1)
    solarize_prob: float = Field(0.0, ge=0, le=1)


class AugmentConfig(ColorConfig):
    """Colours of the student views (the teacher view keeps its own), and every view's scaling."""

    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[Positive, Positive, Positive] = (0.229, 0.224, 0.225)


class MaskConfig(Part):
    policy: Literal["none", "random", "attentive", "inverse"] = "attentive"
    """attentive keeps the blocks that the teacher attends to, inverse the others."""
    keep_ratio: float = Field(0.5, gt=0, le=1)
    """Share of the blocks that is kept, rounded up: 0.5 of 49 is 25."""
    block_size: int = Field(2, ge=1)
    """A block is block_size x block_size patches."""


class TeacherConfig(Part):
    resolution: int = Field(224, gt=0)
    """Side of the teacher view, pixels; half the student's in A-CLIP-eff."""
    momentum: float = Field(0.996, ge=0, le=1)
    """EMA momentum at the first step; it rises to 1 on a cosine over the run."""


class DistillConfig(Part):
    """Masked self-distillation of the image (MaskCLIP): a second pass of the first student view
    with most patches masked, which a decoder predicts. Read when loss.distill has a weight."""

    mask_ratio: float = Field(0.75, gt=0, lt=1)
    """Share of the patches that is masked, rounded down."""
    decoder_layers: int = Field(1, ge=1)
    targets: Literal["codewords", "features", "pixels"] = "codewords"
    """What is predicted: the teacher's features as soft codewords, the features themselves, or the
    patch's normalised pixels, which needs no teacher."""
    num_codewords: int = Field(4096, ge=2)
    student_temperature: float = Field(0.1, gt=0)
    teacher_temperature: float = Field(0.04, gt=0)


class MlmConfig(Part):
    """Masked language modelling of the caption (MaskCLIP). Read when loss.mlm has a weight."""

    mask_ratio: float = Field(0.2, gt=0, le=1)
    """Share of a caption's tokens that is masked, start and end left out, one or more."""
    decoder_layers: int = Field(4, ge=1)


class LossConfig(Part):
    """Weights of the loss terms; a term with weight 0 builds no module and costs nothing."""

    contrastive: float = Field(1.0, gt=0)
    """InfoNCE of images and captions."""
    simclr: float = Field(1.0, ge=0)
    """Between two views of an image; see views.ssl."""
    byol: float = Field(2.0, ge=0)
    """Between the student's views and the teacher's."""
    distill: float = Field(0.0, ge=0)
    """Masked self-distillation; see DistillConfig."""
    mlm: float = Field(0.0, ge=0)
    """Masked language modelling; see MlmConfig."""
    simclr_temperature: float = Field(0.1, gt=0)
    simclr_widths: tuple[Width, Width, Width] = (4096, 4096, 256)
    """Hidden, hidden and output width of the SimCLR head."""
    byol_widths: tuple[Width, Width] = (4096, 256)
    """Hidden and output width of BYOL's projector and predictor."""
    max_logit_scale: float = Field(100.0, gt=1)
    """What the inverse of the temperature, exp(logit_scale), is clamped to."""


class OptimizerConfig(Part):
    """AdamW; biases, norms and other 1-d parameters get no weight decay."""

    lr: float = Field(5e-4, gt=0)
    """At the end of the warm-up."""
    warmup_start_lr: float = Field(1e-6, ge=0)
    """At the first step, from where it rises linearly."""
    final_lr: float = Field(1e-5, ge=0)
    """At the last step, to where it falls on a cosine."""
    weight_decay: float = Field(0.5, ge=0)
    betas: tuple[Beta, Beta] = (0.9, 0.98)
    eps: float = Field(1e-8, gt=0)


class SourceConfig(Part):
    shards: str | list[str]
    """As data.train."""
    weight: Positive
    """Share of the samples that come from here, relative to the other sources' weights."""


class DataConfig(Part):
    train: str | list[str] = []
    """Shards: path, glob or braces, /data/*.tar or /data/{00000..01482}.tar; `pipe:` and a command;
    an address such as s3://bucket/{00000..01482}.tar; `demo` for the built-in scenes."""
    sources: list[SourceConfig] = []
    """Several data sets in place of data.train: [{shards: ..., weight: 3}, ...]. An epoch is as
    many samples as all of them hold together; each gives its weight's share of it. One with more
    weight than its size comes several times, one with less in part, and goes on in the next."""
    val: str | list[str] = []
    """Shards for evaluation; empty for none. For zero-shot accuracy, samples have a .cls and
    classnames.txt lies beside the shards or one folder up."""
    on_shard_error: Literal["stop", "skip"] = "stop"
    """When a shard stays unreadable: end the run, or skip its samples, counted and named."""
    retries: int = Field(5, ge=0)
    """Further tries to fetch a remote shard, after 1, 2, 4, ... seconds."""
    cache: str = ""
    """Folder for fetched shards; empty for `shards` in ACLIP_CACHE (~/.cache/aclip)."""
    cache_gb: Positive = 100
    """Size to which that folder is kept, 10^9 bytes; shards being fetched or read come on top."""
    lanes: int | None = Field(None, ge=1)
    """Virtual lanes that fix the global order; ranks x workers divides them, they the batch."""
    workers: int | None = Field(None, ge=0)
    """Worker processes of a rank; empty for as many, up to 8, as cores and lanes allow."""
    shuffle_block: int = Field(512, ge=1)
    """Samples that a lane shuffles together."""
    crops: Literal["worker", "device"] = "worker"
    """Where views are cut: exactly as Pillow does, by the worker; or on the device, from the whole
    decoded image, which costs the worker about a third of the time. Boxes are the same, pixels
    within 1 level of 255, but for images that max_image_side reduces."""
    max_image_side: int = Field(
        1024, ge=64, validation_alias=AliasChoices("max_image_side", "max_slot_side")
    )
    """With crops: device, an image with a longer side, pixels, is first reduced by the smallest
    whole factor that brings it to this, each pixel the mean of a square."""
    min_image_side: int = Field(16, ge=1)
    """Images with a shorter side, pixels, are skipped and counted."""


class TrainConfig(Part):
    global_batch_size: int = Field(4096, ge=2)
    """Images of one optimizer step over all ranks."""
    epochs: float = Field(25, gt=0)
    """Passes over the data; the schedules end there."""
    warmup_epochs: float = Field(1, ge=0)
    """Of them, those in which the learning rate rises."""
    seed: int = Field(0, ge=0)
    """Of weights, order, views and masks."""
    log_every: int = Field(10, ge=1)
    """Steps between two progress lines."""
    checkpoint_every: int = Field(1_000_000, ge=1)
    """Samples between two checkpoints."""
    keep_checkpoints: int = Field(2, ge=1)
    """The newest N checkpoints stay."""
    keep_every: int = Field(0, ge=0)
    """Samples; the first checkpoint after each multiple stays for good, beside the newest; 0 for
    none."""
    upload_to: str = ""
    """A folder that gets a copy of each checkpoint in the background, as an fsspec URL such as
    s3://bucket/run; empty for none."""
    evaluate_every: int = Field(5_000_000, ge=0)
    """Samples between two evaluations; 0 for the end only."""
    wandb: str = ""
    """Project of Weights & Biases that gets the metrics too; empty for none."""
    hang_timeout: float = Field(600, gt=0)
    """Seconds without progress after which a run ends on every rank and says who stalled; six times
    as long for the start, the first step, an evaluation and a checkpoint."""


class Recipe(Part):
    """One run's method, data and schedule."""

    description: str = ""
    model: ModelConfig = ModelConfig()
    views: ViewsConfig = ViewsConfig()
    augment: AugmentConfig = AugmentConfig()
    ssl_augment: SslColorConfig = SslColorConfig()
    mask: MaskConfig = MaskConfig()
    teacher: TeacherConfig | None = None
    distill: DistillConfig = DistillConfig()
    mlm: MlmConfig = MlmConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()

    @property
    def needs_teacher_view(self) -> bool:
        """Whether the teacher reads a view of its own, which contains the student's."""
        return self.mask.policy in ("attentive", "inverse") or self.loss.byol > 0

    @property
    def distills_features(self) -> bool:
        """Whether the teacher's patch features are targets; it then reads the student's view."""
        return self.loss.distill > 0 and self.distill.targets != "pixels"

    @property
    def needs_teacher(self) -> bool:
        return self.needs_teacher_view or self.distills_features

    @model_validator(mode="after")
    def _check_combination(self) -> "Recipe":
        if self.needs_teacher and self.teacher is None:
            raise ValueError(
                f"teacher is empty, but mask.policy {self.mask.policy} with loss.byol "
                f"{self.loss.byol:g} and loss.distill {self.loss.distill:g} needs one; set "
                "teacher.resolution, or mask.policy to none or random and both losses to 0"
            )
        if self.teacher is not None:
            self._check_teacher(self.teacher)
        self._check_views()
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

    def _check_teacher(self, teacher: TeacherConfig) -> None:
        if not self.needs_teacher:
            raise ValueError(
                f"teacher.resolution is {teacher.resolution}, but neither mask.policy "
                f"{self.mask.policy} nor a loss uses a teacher; set teacher=null"
            )
        if not self.needs_teacher_view and teacher.resolution != self.model.image.resolution:
            raise ValueError(
                f"teacher.resolution is {teacher.resolution}, but loss.distill alone lets the "
                "teacher read the student's view; set it to model.image.resolution "
                f"{self.model.image.resolution}"
            )

    def _check_views(self) -> None:
        views = self.views
        if self.loss.simclr > 0 and 2 not in (views.student, views.ssl):
            raise ValueError(
                f"loss.simclr is {self.loss.simclr:g} with views.student {views.student} and "
                "views.ssl 0, but it compares two views; set one of them to 2 or loss.simclr to 0"
            )
        if views.ssl and not self.loss.simclr:
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
