"""What one training step of a recipe runs per sample, as plain numbers: tower passes and heads.

`flops.py` and `memory.py` count from it; only `describe_step` reads a Recipe. A part of a method
is one more pass or head in the list, and both counts follow.
"""

from dataclasses import dataclass, replace

from torch import nn

from aclip.config.geometry import kept_blocks
from aclip.config.recipe import Recipe
from aclip.config.sections import Recompute
from aclip.models.student import Student
from aclip.models.text import VOCAB_SIZE

IMAGE, TEXT, TEACHER = "image tower", "text tower", "teacher"
PROJECTIONS, SIMCLR, BYOL = "projections", "SimCLR", "BYOL"
DISTILL, MLM, LOGITS = "distillation", "MLM", "logits"


@dataclass(frozen=True)
class BlockShape:
    """A pre-norm transformer block of two-layer MLPs.

    Attributes:
        width: of the residual stream and of attention.
        mlp_width: hidden width of the MLP. num_heads: of attention.
    """

    width: int
    mlp_width: int
    num_heads: int


@dataclass(frozen=True)
class PatchEmbedShape:
    """num_patches patches of num_inputs values each; `trained` if its weight gets a gradient."""

    num_patches: int
    num_inputs: int
    trained: bool


@dataclass(frozen=True)
class TowerPass:
    """A tower, or a decoder's blocks, over one sample.

    Attributes:
        name: of the table's row; passes and heads of one name are added up.
        block: shape of its blocks. num_blocks: how many.
        num_tokens: of one run; a mean, where samples differ.
        padded_tokens: rows of attention where it is padded to the longest sample, else None.
        num_runs: views of the sample that it reads.
        one_query_at_end: the last block computes one row alone, and no keys and values.
        embed: of an image tower.
        trained: the pass has a backward pass.
        recompute: what the backward pass computes again (aclip/models/recompute.py); None where
            that can't be chosen.
    """

    name: str
    block: BlockShape
    num_blocks: int
    num_tokens: float
    padded_tokens: float | None = None
    num_runs: int = 1
    one_query_at_end: bool = False
    embed: PatchEmbedShape | None = None
    trained: bool = True
    recompute: Recompute | None = None

    @property
    def attended_tokens(self) -> float:
        return self.num_tokens if self.padded_tokens is None else self.padded_tokens


@dataclass(frozen=True)
class HeadShape:
    """Linear layers of these widths over rows of a sample; BatchNorm and ReLU between them.

    Attributes:
        num_rows: rows of one sample; a mean, where samples differ.
        trained: it has a backward pass.
        with_towers: it runs with the towers, on a micro-batch, not on the local batch.
        logit_bytes: what a softmax over its outputs keeps for the backward pass, per value.
    """

    name: str
    widths: tuple[int, ...]
    num_rows: float
    trained: bool = True
    with_towers: bool = False
    logit_bytes: int = 0


@dataclass(frozen=True)
class StepShape:
    """One step's work per sample.

    Attributes:
        towers, heads: what runs.
        num_views: views that the contrastive loss reads. embed_dim: of its embeddings.
        simclr_dim: of SimCLR's, None without that loss.
        global_batch_size: columns of the logits.
    """

    towers: tuple[TowerPass, ...]
    heads: tuple[HeadShape, ...]
    num_views: int
    embed_dim: int
    simclr_dim: int | None
    global_batch_size: int


def describe_step(
    recipe: Recipe, student: Student, caption_tokens: float, longest_caption: float | None = None
) -> StepShape:
    """The step of a recipe.

    Args:
        recipe: names the parts.
        student: built from it, on any device, the meta device included.
        caption_tokens: mean length of the captions, start and end included.
        longest_caption: of a micro-batch, to which attention is padded; None for the context.
    """
    context = recipe.model.text.context_length
    caption_tokens = min(caption_tokens, context)
    longest = context if longest_caption is None else longest_caption
    towers, heads = _contrastive(recipe, student, caption_tokens, longest)
    for add in (_simclr, _byol, _teacher_view, _distillation):
        more_towers, more_heads = add(recipe, student)
        towers, heads = towers + more_towers, heads + more_heads
    if recipe.loss.mlm > 0:
        more_towers, more_heads = _mlm(recipe, student, caption_tokens, longest)
        towers, heads = towers + more_towers, heads + more_heads
    return StepShape(
        tuple(towers),
        tuple(heads),
        recipe.views.student,
        recipe.model.embed_dim,
        recipe.loss.simclr_widths[-1] if recipe.loss.simclr > 0 else None,
        recipe.train.global_batch_size,
    )


def with_recompute(step: StepShape, recompute: Recompute) -> StepShape:
    """The step with another choice for all towers that have one."""
    towers = (
        tower if tower.recompute is None else replace(tower, recompute=recompute)
        for tower in step.towers
    )
    return replace(step, towers=tuple(towers))


def _contrastive(recipe: Recipe, student: Student, caption_tokens: float, longest: float):
    num_kept = student.image.grid**2
    if recipe.mask.policy != "none":
        num_kept = kept_blocks(recipe, student.image.grid) * recipe.mask.block_size**2
    num_views, embed_dim = recipe.views.student, recipe.model.embed_dim
    towers = [
        _image_pass(recipe, student, IMAGE, num_kept, num_runs=num_views),
        _text_pass(recipe, TEXT, caption_tokens, longest, one_query_at_end=True),
    ]
    heads = [
        HeadShape(PROJECTIONS, (student.image.width, embed_dim), num_views),
        HeadShape(PROJECTIONS, (student.text.width, embed_dim), 1),
    ]
    return towers, heads


def _simclr(recipe: Recipe, student: Student):
    if not recipe.loss.simclr:
        return [], []
    towers = []
    if recipe.views.ssl:
        num_patches = student.image.grid**2
        towers = [_image_pass(recipe, student, SIMCLR, num_patches, num_runs=recipe.views.ssl)]
    return towers, [HeadShape(SIMCLR, (student.image.width, *recipe.loss.simclr_widths), 2)]


def _byol(recipe: Recipe, student: Student):
    if not recipe.loss.byol:
        return [], []
    hidden, output = recipe.loss.byol_widths
    projector = (student.image.width, hidden, output)
    return [], [
        HeadShape(BYOL, projector, recipe.views.student),
        HeadShape(BYOL, (output, hidden, output), recipe.views.student),
        HeadShape(TEACHER, projector, 1, trained=False),
    ]


def _teacher_view(recipe: Recipe, student: Student):
    if not recipe.needs_teacher_view:
        return [], []
    num_patches = (recipe.teacher.resolution // student.image.patch_size) ** 2
    return [_image_pass(recipe, student, TEACHER, num_patches, trained=False)], []


def _distillation(recipe: Recipe, student: Student):
    if not recipe.loss.distill:
        return [], []
    config, width, num_patches = recipe.distill, student.image.width, student.image.grid**2
    num_masked = int(config.mask_ratio * num_patches)
    towers = [
        _image_pass(recipe, student, DISTILL, num_patches - num_masked, one_query_at_end=False),
        TowerPass(DISTILL, _decoder_block(width), config.decoder_layers, 1 + num_patches),
    ]
    out_width = 3 * student.image.patch_size**2 if config.targets == "pixels" else width
    heads = [HeadShape(DISTILL, (width, out_width), num_masked, with_towers=True)]
    if recipe.distills_features:
        towers.append(
            _image_pass(
                recipe, student, TEACHER, num_patches, one_query_at_end=False, trained=False
            )
        )
    if config.targets == "codewords":
        widths = (width, config.num_codewords)
        # The targets and the log-softmax, fp32.
        heads += [
            HeadShape(DISTILL, widths, num_masked, with_towers=True, logit_bytes=8),
            HeadShape(TEACHER, widths, num_masked, trained=False, with_towers=True),
        ]
    return towers, heads


def _mlm(recipe: Recipe, student: Student, caption_tokens: float, longest: float):
    width = student.text.width
    num_masked = max(1.0, recipe.mlm.mask_ratio * (caption_tokens - 2))
    towers = [
        _text_pass(recipe, MLM, caption_tokens, longest, one_query_at_end=False),
        TowerPass(MLM, _decoder_block(width), recipe.mlm.decoder_layers, longest),
    ]
    widths = (width, VOCAB_SIZE)
    return towers, [HeadShape(MLM, widths, num_masked, with_towers=True, logit_bytes=4)]


def _image_pass(
    recipe: Recipe,
    student: Student,
    name: str,
    num_kept: int,
    num_runs: int = 1,
    one_query_at_end: bool = True,
    trained: bool = True,
) -> TowerPass:
    vit, config = student.image.vit, recipe.model.image
    patches = student.image.grid**2 if trained else num_kept
    return TowerPass(
        name,
        _image_block(student),
        len(vit.blocks),
        1 + num_kept,
        num_runs=num_runs,
        one_query_at_end=one_query_at_end,
        embed=PatchEmbedShape(
            patches, 3 * student.image.patch_size**2, trained and not config.freeze_patch_embed
        ),
        trained=trained,
        recompute=config.recompute if trained else None,
    )


def _text_pass(
    recipe: Recipe, name: str, caption_tokens: float, longest: float, one_query_at_end: bool
) -> TowerPass:
    config = recipe.model.text
    return TowerPass(
        name,
        BlockShape(config.width, 4 * config.width, config.heads),
        config.layers,
        caption_tokens,
        padded_tokens=longest,
        one_query_at_end=one_query_at_end,
        recompute=config.recompute,
    )


def _image_block(student: Student) -> BlockShape:
    """The shape of the image tower's blocks, which timm's keywords may change."""
    block = student.image.vit.blocks[0]
    linears = [module for module in block.mlp.modules() if isinstance(module, nn.Linear)]
    # A gated MLP has half as many weights more: counted as a wider plain one.
    mlp_width = sum(linear.weight.numel() for linear in linears) // (2 * student.image.width)
    return BlockShape(student.image.width, mlp_width, block.attn.num_heads)


def _decoder_block(width: int) -> BlockShape:
    return BlockShape(width, 4 * width, num_heads=max(1, width // 64))
