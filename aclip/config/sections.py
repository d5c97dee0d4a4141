"""The sections of a recipe that no method declares: towers, views, data and so on.

No torch in here, since scripts that start over ssh read them too.
"""

from typing import Annotated, Any, Literal

from pydantic import AliasChoices, Discriminator, Field, Tag

from aclip.section import Positive, Section, Strength

Recompute = Literal["none", "elementwise", "blocks"]
HueShift = Annotated[float, Field(ge=0, le=0.5)]
CaptionKeys = Annotated[
    Annotated[list[str], Tag("list[str]")]
    | Annotated[dict[str, Positive], Tag("dict[str, float]")],
    # So that a message speaks of what was given: keys in a list, or probabilities by key.
    Discriminator(lambda value: "dict[str, float]" if isinstance(value, dict) else "list[str]"),
]
"""Keys of captions, see caption_keys.py: in an order of preference, or with probabilities."""


class ImageTowerConfig(Section):
    name: str = "vit_base_patch16_224"
    """Any timm VisionTransformer or Eva whose patches can be dropped: with registers, learned or
    rotary positions, and features from a CLS token, an attention pool or a mean."""
    resolution: int = Field(224, gt=0)
    """Side of a student view, pixels; overrides the size in the name."""
    kwargs: dict[str, Any] = {}
    """More keyword arguments for timm, e.g. {embed_dim: 192, depth: 3, num_heads: 3}."""
    freeze_patch_embed: bool = True
    """Patch embedding stays at its initialisation (MoCo v3), in student and teacher."""
    recompute: Recompute = "none"
    """What the backward pass computes again to save memory: elementwise (norms and activations,
    about a third less, cheap) or blocks (all of each block, far less, a third more time)."""


class TextTowerConfig(Section):
    """CLIP's transformer of these sizes or, with `name`, a model of Hugging Face's."""

    name: str = ""
    """A local folder with a text model of Hugging Face's and its tokenizer, in place of CLIP's and
    of width, heads and layers; see aclip/recipes/README.md. Nothing is fetched."""
    pretrained: bool = True
    """Whether a tower of a folder starts from the folder's weights; otherwise at random."""
    pooling: Literal["end", "cls", "mean"] | None = None
    """What the feature of a folder's tower is: its last token (end), its first one (cls), or the
    mean of a caption's tokens. Empty for end where the model is causal, else cls."""
    width: int = Field(512, gt=0)
    heads: int = Field(8, gt=0)
    layers: int = Field(12, gt=0)
    context_length: int = Field(77, ge=3)
    """Tokens of a caption, start and end included; longer captions are cut, the end token stays."""
    recompute: Recompute = "none"


class ModelConfig(Section):
    image: ImageTowerConfig = ImageTowerConfig()
    text: TextTowerConfig = TextTowerConfig()
    embed_dim: int = Field(512, gt=0)
    """Size of the joint embedding."""
    init: str = ""
    """Weights that a new run starts from, student and teacher: see aclip/weights/README.md."""
    compile: bool = False
    """torch.compile of the towers' blocks. On a GPU in bf16 a step waits for memory more than for
    matrix products; the compiler fuses norms, activations and residuals, which move most of it. The
    first step takes minutes longer. Not with ZeRO stage 3."""


class TextConfig(Section):
    """How a caption is made shorter for training, see aclip/data/reduce.py. Evaluation reads whole
    captions, up to model.text.context_length."""

    reduce: Literal["truncate", "block", "random", "frequency"] = "truncate"
    """What is kept of a caption that is longer than `tokens`: the beginning (truncate), a random
    window (block), random tokens in their order (random), or random words of which common ones go
    first (frequency, as in CLIPF)."""
    tokens: int | None = Field(None, ge=3)
    """Most tokens of a caption in training, start and end included; empty for all that the tower
    reads, model.text.context_length."""
    word_counts: str = ""
    """The file of `launch/convert.py word-counts` that frequency reads; empty for word_counts.json
    beside the shards, which for the built-in scenes is made on first use."""
    threshold: float = Field(1e-6, gt=0)
    """The t of frequency: a word with the share f of all words has the probability
    max(0, 1 - sqrt(t / f)) to go first. CLIPF takes 1e-6 on CC12M and 1e-7 on larger sets."""


class ViewsConfig(Section):
    student: int = Field(2, ge=1, le=2)
    """Views of an image that the student contrasts with the caption."""
    scale: tuple[float, float] = (0.5, 1.0)
    """Area of a student view as a share of the image, RandomResizedCrop's `scale`."""
    ssl: Literal[0, 2] = 0
    """Views with all patches and strong augmentation that SimCLR compares, as in SLIP; with 0 it
    compares the student views."""
    ssl_scale: tuple[float, float] = (0.08, 1.0)
    ssl_flip_prob: float = Field(0.5, ge=0, le=1)


class ColorConfig(Section):
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


class TeacherConfig(Section):
    resolution: int = Field(224, gt=0)
    """Side of the teacher view, pixels; half the student's in A-CLIP-eff."""
    score_layers: int | None = Field(None, ge=1)
    """The scores are the attention of the first so many blocks, mean over them; empty for all.
    Where no loss reads the teacher's features, the blocks behind are not run."""
    momentum: float = Field(0.996, ge=0, le=1)
    """EMA momentum at the first step; it rises to 1 on a cosine over the run."""
    reuse: int = Field(1, ge=1)
    """Epochs that share a sample's scores: with 4 the teacher scores every sample in one epoch of
    four, of the whole image, and the other three read what it found, a byte a patch in the run
    folder's `scores`. For a mask alone: a loss that reads the teacher needs it in every step."""


class SourceConfig(Section):
    shards: str | list[str]
    """The source's shards, given as in data.train."""
    weight: Positive
    """Share of the samples that come from here, relative to the other sources' weights."""
    captions: CaptionKeys = []
    """The source's data.captions; empty for these."""


class DataConfig(Section):
    train: str | list[str] = []
    """Shards: path, folder, glob or braces, /data/*.tar or /data/{00000..01482}.tar; `pipe:` and a
    command; an address such as s3://bucket/{00000..01482}.tar; `demo` for the built-in scenes."""
    sources: list[SourceConfig] = []
    """Several data sets in place of data.train: [{shards: ..., weight: 3}, ...]. An epoch has
    as many samples as all of them hold together, shared out by weight. All samples of a source come
    before one of them comes again: a source with a large weight repeats within an epoch, one with a
    small weight is read in part and goes on in the next."""
    captions: CaptionKeys = []
    """Which caption of a sample is trained on: keys in an order of preference, of which the first
    that the sample has counts, as [long.txt, txt]; or keys with probabilities, drawn each time a
    sample comes, as {long.txt: 0.7, txt: 0.3}, and drawn again where the sample lacks one. A key
    is a member (txt, long.txt: a line is a caption), a field of KEY.json (long_caption) or of
    another json (syn.json:syn_text). Of several captions under a key one is drawn. Empty for
    KEY.txt and KEY.json together, as evaluation reads them in any case."""
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
    """Number of virtual lanes, which fix the global order. Ranks x workers must divide it, and it
    must divide the global batch. Empty for the batch's largest divisor up to 1024."""
    workers: int | None = Field(None, ge=0)
    """Worker processes of a rank; empty for as many, up to 16, as cores and lanes allow."""
    shuffle_block: int = Field(512, ge=1)
    """Samples that a lane shuffles together; it reads them from neighbouring places in shards."""
    captions_per_image: int = Field(1, ge=1)
    """Captions of an image that a step reads, each of them a positive of the image: so many
    different ones are drawn, all of them where an image has fewer. The text tower encodes each."""
    crops: Literal["worker", "device"] | None = None
    """Where views are cut: exactly as Pillow does, by the worker; or on the device, from the whole
    decoded image, which costs the worker about a third of the time. Boxes are the same, pixels
    within 1 level of 255, but for images that max_image_side reduces. Empty for the device in a run
    that begins on GPUs, else for the worker; a run that goes on keeps what it began with."""
    max_image_side: int = Field(
        1024, ge=64, validation_alias=AliasChoices("max_image_side", "max_slot_side")
    )
    """Longest side, in pixels, that an image keeps with crops: device. A larger image is first
    reduced by the smallest whole factor that fits it; each new pixel is the mean of a square."""
    min_image_side: int = Field(16, ge=1)
    """Images with a side shorter than this, in pixels, are skipped and counted."""


class TrainConfig(Section):
    global_batch_size: int = Field(4096, ge=2)
    """Images of one optimizer step over all ranks."""
    epochs: float = Field(25, gt=0)
    """Passes over the data; the schedules end there."""
    samples: int | None = Field(None, ge=1)
    """The length of the run, or of its stage, in samples; empty for one in epochs."""
    warmup_epochs: float = Field(1, ge=0)
    """Passes at the start in which the learning rate rises."""
    average: float = Field(0.0, ge=0, lt=1)
    """Momentum at the first step of an average of the weights, which rises to 1 on a cosine over
    the run and is evaluated and exported as a teacher is, without a forward pass in a step; 0 for
    none. A teacher is such an average, with teacher.momentum."""
    seed: int = Field(0, ge=0)
    """The seed of weights, order, views and masks."""
    log_every: int = Field(10, ge=1)
    """Steps between two progress lines; a short run shows ten."""
    checkpoint_every: int = Field(15_000_000, ge=0)
    """Samples between two checkpoints; 0 to go by time alone."""
    checkpoint_minutes: float = Field(20, ge=0)
    """Minutes after which the next checkpoint is written at the latest; 0 to go by samples alone.
    Both defaults together lose at most 20 minutes, and do not depend on the number of GPUs."""
    keep_checkpoints: int = Field(2, ge=1)
    """The newest N checkpoints stay."""
    keep_every: int = Field(0, ge=0)
    """The first checkpoint after each multiple of so many samples stays for good; 0 for none."""
    upload_to: str = ""
    """A folder that gets a copy of each checkpoint in the background, as an fsspec URL such as
    s3://bucket/run; empty for none."""
    evaluate_every: int = Field(15_000_000, ge=0)
    """Samples between two evaluations; 0 for the end only."""
    evaluate_at: list[Annotated[int, Field(ge=1)]] = []
    """Numbers of samples, counted over all stages, after which the run is evaluated too."""
    wandb: str = ""
    """Project of Weights & Biases that gets the metrics too; empty for none."""
    hang_timeout: float = Field(600, gt=0)
    """Seconds without progress after which a run ends on every rank and says who stalled; six times
    as long for the start, the first step, an evaluation and a checkpoint."""
