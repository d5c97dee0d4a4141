"""A recipe in plain words, and the papers that its parts are from."""

from collections.abc import Iterator

from torch import nn

from aclip.config.geometry import patch_grid
from aclip.config.public_values import public_name
from aclip.config.recipe import Recipe
from aclip.models.student import Student

MASKS = {
    "attentive": "those that the teacher attends to most",
    "inverse": "those that the teacher attends to least",
    "random": "at random",
    "gaussian": "at random, those near the middle more often",
    "cluster": "those that look like no random patch",
}
"""Which blocks a policy keeps; `none` has a sentence of its own."""
LOSSES = {
    "contrastive": "CLIP's contrastive loss",
    "sigmoid": "SigLIP's sigmoid loss",
    "simclr": "SimCLR between two views",
    "byol": "BYOL towards the teacher",
    "distill": "masked self-distillation",
    "mlm": "masked language modelling",
    "words": "classification of the caption's words",
}
REDUCTIONS = {
    "truncate": "their beginning",
    "block": "a random window",
    "random": "random tokens",
    "frequency": "random words, of which common ones go first",
}
"""What a way of text.reduce keeps of a long caption."""
OF_MASKS = {
    "random": ("FLIP", "2212.00794"),
    "gaussian": ("GLIP", "2403.15837"),
    "cluster": ("cluster masking", "2405.08815"),
}
OF_LOSSES = {
    "sigmoid": ("SigLIP", "2303.15343"),
    "simclr": ("SimCLR", "2002.05709"),
    "byol": ("BYOL", "2006.07733"),
    "distill": ("MaskCLIP", "2208.12262"),
    "mlm": ("MaskCLIP", "2208.12262"),
    "words": ("SuperCLIP", "2512.14480"),
}
CLIP = ("CLIP", "2103.00020")
SLIP = ("SLIP", "2112.12750")
CLIPA = ("CLIPA", "2305.07017")
CLIPF = ("CLIPF", "2412.16148")
LIT = ("LiT", "2111.07991")


def describe(recipe: Recipe, student: Student) -> dict[str, str]:
    """What the recipe trains, a line for each of its sides, by the side's name.

    Args:
        student: the recipe's, for the sizes of its towers.
    """
    lines = {
        "Image tower": _image_tower(recipe, student.image),
        "Text tower": _text_tower(recipe, student.text),
        "Joint embedding": f"{recipe.model.embed_dim} numbers",
        "Start": f"from the weights {public_name(recipe.model.init)}" if recipe.model.init else "",
        "Mask": _mask(recipe),
        "Views": "; ".join(_views(recipe)),
        "Captions": _captions(recipe),
        "Losses": ", ".join(
            f"{term.weight:g} x {LOSSES[term.name]} (`loss.{term.name}`)" for term in recipe.terms
        ),
        "Average": _average(recipe),
        "Optimizer": _optimizer(recipe),
    }
    return {side: line for side, line in lines.items() if line}


def papers_of(recipe: Recipe) -> dict[str, str]:
    """The papers that parts of the recipe are from, as numbers of arXiv by the method's name;
    A-CLIP is cited in any case."""
    optimizer, text = recipe.optimizer, recipe.text
    found = [CLIP, OF_MASKS.get(recipe.mask.policy)]
    found += [OF_LOSSES.get(term.name) for term in recipe.terms]
    found += [SLIP if recipe.views.ssl and recipe.loss.simclr else None]
    if text.tokens is not None:
        found.append(CLIPF if text.reduce == "frequency" else CLIPA)
    found += [LIT if "image" in optimizer.locked_towers else None]
    return dict(paper for paper in found if paper is not None)


def _image_tower(recipe: Recipe, tower: nn.Module) -> str:
    image, grid = recipe.model.image, patch_grid(recipe)
    kwargs = ", ".join(f"{name}={value}" for name, value in image.kwargs.items())
    locked = ", locked" if "image" in recipe.optimizer.locked_towers else ""
    return (
        f"`{image.name}` of timm{f' with {kwargs}' if kwargs else ''}, {image.resolution} px, "
        f"{grid} x {grid} patches, {_size(tower)}{locked}"
    )


def _text_tower(recipe: Recipe, tower: nn.Module) -> str:
    text = recipe.model.text
    kind = f"CLIP's transformer, {text.layers} layers of width {text.width}, {text.heads} heads"
    if text.name:
        kind = "a text model of Hugging Face's"
    locked = ", locked" if "text" in recipe.optimizer.locked_towers else ""
    return f"{kind}, up to {text.context_length} tokens, {_size(tower)}{locked}"


def _size(tower: nn.Module) -> str:
    return f"{sum(p.numel() for p in tower.parameters()) / 1e6:,.1f} M parameters"


def _mask(recipe: Recipe) -> str:
    mask = recipe.mask
    if mask.policy == "none":
        return "none, the tower reads every patch"
    block = "single patches" if mask.block_size == 1 else f"blocks of {mask.block_size} x "
    block += "" if mask.block_size == 1 else f"{mask.block_size} patches"
    share = _percent(mask.keep_ratio)
    if mask.keep_ratio_end is not None:
        share += f", changing to {_percent(mask.keep_ratio_end)},"
    words = f"`{mask.policy}`: of each view {share} of its {block} are kept, {MASKS[mask.policy]}"
    if mask.warmup:
        how = "" if mask.warmup_change == "at_once" else ", less and less"
        words += f"; at random in the first {_percent(mask.warmup)} of the steps{how}"
    if mask.temperature:
        words += f"; drawn with temperature {mask.temperature:g}"
    return words


def _views(recipe: Recipe) -> Iterator[str]:
    views = recipe.views
    number = f"{views.student} view{'s'[: views.student > 1]}"
    yield f"{number} of an image beside its caption, {_area(views.scale)} of its area"
    if recipe.needs_teacher_view:
        reuse = recipe.teacher.reuse
        often = f" in one epoch of {reuse}" if reuse > 1 else ""
        yield f"the teacher reads the image at {recipe.teacher.resolution} px{often}"
    if views.ssl and recipe.loss.simclr:
        yield f"{views.ssl} more for SimCLR, {_area(views.ssl_scale)} of the area"


def _area(scale: tuple[float, float]) -> str:
    least, most = (_percent(share) for share in scale)
    return least if least == most else f"{least.removesuffix(' %')} to {most}"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _captions(recipe: Recipe) -> str:
    whole = f"up to {recipe.caption_tokens} tokens"
    if recipe.text.tokens is not None:
        whole += f", of a longer one {REDUCTIONS[recipe.text.reduce]}"
    several = recipe.data.captions_per_image
    return f"{several} of each image at once, {whole}" if several > 1 else whole


def _average(recipe: Recipe) -> str:
    if recipe.average_momentum is None:
        return ""
    name = "the teacher, an average" if recipe.teacher is not None else "an average"
    return f"{name} of the weights with momentum {recipe.average_momentum:g}, rising to 1"


def _optimizer(recipe: Recipe) -> str:
    optimizer = recipe.optimizer
    return (
        f"{optimizer.name}, {recipe.train.global_batch_size:,} images a step, learning rate "
        f"{optimizer.lr:g} ({optimizer.schedule}), weight decay {optimizer.weight_decay:g}"
    )
