"""What of a recipe does not fit together: one sentence for each combination that means nothing."""

from aclip.config.caption_keys import check_captions
from aclip.config.optimizer import check_with_recipe
from aclip.config.sections import TextTowerConfig
from aclip.method.losses.terms import TERMS
from aclip.method.masks.policies import POLICIES


def check_combination(recipe) -> None:
    """Refuses a recipe (aclip.config.recipe.Recipe) whose parts do not fit together.

    Raises:
        ValueError: one sentence with the field, the value and what to do.
    """
    _check_terms(recipe)
    _check_mask(recipe)
    _check_teacher(recipe)
    _check_reuse(recipe)
    _check_views(recipe)
    check_with_recipe(recipe)
    check_captions(recipe.data, recipe.text, recipe.model.text.context_length)
    _check_text(recipe)
    for part in ("augment", "ssl_augment"):
        low, high = getattr(recipe, part).blur_sigma
        if low > high:
            raise ValueError(f"{part}.blur_sigma is [{low:g}, {high:g}]; give the lower one first")
    if recipe.data.train and recipe.data.sources:
        raise ValueError(
            f"data.train is {recipe.data.train} and data.sources holds "
            f"{len(recipe.data.sources)} sources; give one of the two, e.g. data.train=[]"
        )


def _check_text(recipe) -> None:
    text, default = recipe.model.text, TextTowerConfig()
    if not text.name:
        for key in ("pretrained", "pooling"):
            if getattr(text, key) != getattr(default, key):
                raise ValueError(
                    f"model.text.{key} is {str(getattr(text, key)).lower()}, but model.text."
                    "name is empty; name a folder, or remove the key"
                )
        if text.width % text.heads:
            raise ValueError(
                f"model.text.heads is {text.heads}, which does not divide model.text.width "
                f"{text.width}; change one of them"
            )
        return
    for key in ("width", "heads", "layers"):
        if getattr(text, key) != getattr(default, key):
            raise ValueError(
                f"model.text.{key} is {getattr(text, key)}, but the model in model.text.name "
                f"{text.name} has its own; remove the key"
            )
    if recipe.text.tokens is not None:
        raise ValueError(
            f"text.tokens is {recipe.text.tokens}, which shortens captions in CLIP's vocabulary, "
            f"but model.text.name is {text.name}, a tower with another; remove the key, or lower "
            "model.text.context_length"
        )
    if recipe.text.reduce != "truncate":
        raise ValueError(
            f"text.reduce is {recipe.text.reduce}, which picks tokens of CLIP's vocabulary, but "
            f"model.text.name is {text.name}, a tower with another; remove the key, so that longer "
            "captions are cut at model.text.context_length"
        )
    if text.recompute == "elementwise":
        raise ValueError(
            f"model.text.recompute is elementwise, which the model in model.text.name "
            f"{text.name} can't; take blocks or none"
        )
    if recipe.model.compile:
        raise ValueError(
            f"model.compile is true, but model.text.name is {text.name}, whose model is not "
            "compiled; set model.compile=false"
        )


def _check_terms(recipe) -> None:
    if not any(term.aligns for term in recipe.weighted_terms):
        weights = " and ".join(f"loss.{term.name} is 0" for term in TERMS if term.aligns)
        raise ValueError(
            f"{weights}, so that nothing brings images and captions together; give "
            "loss.contrastive a weight"
        )
    for term in recipe.weighted_terms:
        term.check(recipe)


def _check_mask(recipe) -> None:
    for name in ("warmup", "temperature"):
        value = getattr(recipe.mask, name)
        if value and not recipe.mask_policy.reads_teacher:
            raise ValueError(
                f"mask.{name} is {value:g}, but mask.policy {recipe.mask.policy} does not go by "
                f"the teacher's scores; set mask.{name}=0, or mask.policy to attentive or "
                "inverse"
            )
    readers = {
        key: policy.name
        for policy in POLICIES.values()
        if policy.keys
        for key in policy.keys.model_fields
    }
    for key, reader in readers.items():
        value, default = getattr(recipe.mask, key), type(recipe.mask).model_fields[key].default
        if value != default and reader != recipe.mask.policy:
            raise ValueError(
                f"mask.{key} is {value:g}, but mask.policy {recipe.mask.policy} does not read "
                f"it; leave it out, or set mask.policy to {reader}"
            )
    end = recipe.mask.keep_ratio_end
    if end is not None and recipe.mask.policy == "none":
        raise ValueError(
            f"mask.keep_ratio_end is {end:g}, but mask.policy none keeps every patch; set it "
            "to null, or take another mask.policy"
        )


def _check_teacher(recipe) -> None:
    readers = [f"mask.policy {recipe.mask.policy}"] if recipe.mask_policy.reads_teacher else []
    readers += [
        f"loss.{term.name} {term.weight:g}"
        for term in recipe.terms
        if term.reads_teacher_features or term.reads_teacher_patches
    ]
    if readers and recipe.teacher is None:
        raise ValueError(
            f"teacher is empty, but {' and '.join(readers)} needs one; set "
            "teacher.resolution, or mask.policy to none or random and such losses to 0"
        )
    if recipe.teacher is None:
        return
    if recipe.train.average:
        raise ValueError(
            f"train.average is {recipe.train.average:g}, but the teacher is such an average "
            f"already, with teacher.momentum {recipe.teacher.momentum:g}; set train.average=0"
        )
    resolution = recipe.teacher.resolution
    if not readers:
        raise ValueError(
            f"teacher.resolution is {resolution}, but neither mask.policy {recipe.mask.policy} "
            "nor a loss uses a teacher; set teacher=null"
        )
    if not recipe.needs_teacher_view and resolution != recipe.model.image.resolution:
        raise ValueError(
            f"teacher.resolution is {resolution}, but {' and '.join(readers)} alone lets the "
            "teacher read the student's view; set it to model.image.resolution "
            f"{recipe.model.image.resolution}"
        )
    score_layers = recipe.teacher.score_layers
    if score_layers is not None and not recipe.mask_policy.reads_teacher:
        raise ValueError(
            f"teacher.score_layers is {score_layers}, but mask.policy {recipe.mask.policy} reads "
            "no scores; remove the key"
        )


def _check_reuse(recipe) -> None:
    if not recipe.keeps_scores:
        return
    reuse = f"teacher.reuse is {recipe.teacher.reuse}"
    if not recipe.mask_policy.reads_teacher:
        raise ValueError(
            f"{reuse}, but mask.policy {recipe.mask.policy} reads no scores of the teacher that "
            "could be kept; set teacher.reuse to 1, or mask.policy to attentive or inverse"
        )
    for term in recipe.terms:
        if term.reads_teacher_features or term.reads_teacher_patches:
            raise ValueError(
                f"{reuse}, but loss.{term.name} {term.weight:g} needs the teacher in every "
                f"step; set teacher.reuse to 1, or loss.{term.name} to 0"
            )
    if recipe.data.sources:
        raise ValueError(
            f"{reuse}, but data.sources holds {len(recipe.data.sources)} sources, whose samples "
            "do not come once an epoch each; set teacher.reuse to 1, or give one data set as "
            "data.train"
        )


def _check_views(recipe) -> None:
    views = recipe.views
    if views.ssl and not any(term.reads_ssl_views for term in recipe.weighted_terms):
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
