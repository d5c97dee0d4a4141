"""Where a new run starts from: `model.init`, weights of other runs and projects.

recognise.py opens them; here they are matched with the student that the recipe builds, and what
happened to every key is reported.
"""

from dataclasses import asdict, dataclass

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from aclip.config.optimizer import TOWERS
from aclip.errors import ConfigError
from aclip.models.student import Student
from aclip.weights.names import TowerFacts, tower_facts
from aclip.weights.recognise import IMAGE_TOWER, InitialWeights, open_weights

IMAGE_POSITIONS = "image.vit.pos_embed"
TEXT_POSITIONS = "text.transformer.embeddings.position_embedding.weight"


@dataclass(frozen=True)
class InitReport:
    """What became of every key.

    Attributes:
        init: the recipe's model.init.
        layout: the format that was recognised, and what had to be assumed.
        used, resized, ignored: keys of the file; resized ones are used too.
        random: parameters of the student that keep their random initialisation.
    """

    init: str
    layout: str
    used: list[str]
    resized: list[str]
    ignored: list[str]
    random: list[str]

    def summary(self) -> str:
        return (
            f"starting from {self.init} ({self.layout}): {len(self.used)} keys used, "
            f"{len(self.resized)} of them resized, {len(self.ignored)} ignored; "
            f"{len(self.random)} parameters of the student stay random; see init_report.json"
        )

    def to_dict(self) -> dict:
        return asdict(self)


def load_initial_weights(student: Student, init: str) -> InitReport:
    """Writes weights into a student that DeepSpeed has not wrapped yet.

    Args:
        init: a SLIP or A-CLIP checkpoint; a training checkpoint or `local-dir` folder of
            open_clip's; a checkpoint, run folder or export of aclip; `hf-hub:` with a name of the
            Hub; or `timm:` with a file or a pretrained model's name, for the image tower alone.

    Raises:
        ConfigError: nothing such is there, or its keys, shapes or heads are not the recipe's.
    """
    weights = open_weights(init)
    _check_facts(init, weights.facts, student)
    parameters = student.model_parameters()
    converted, keys = _convert(init, weights, parameters)
    resized = []
    for name, tensor in converted.items():
        if tensor.shape != parameters[name].shape:
            num_prefix = student.image.num_prefix_positions
            tensor = _resize(init, keys[name], name, tensor, parameters[name], num_prefix)
            resized.append(keys[name])
        converted[name] = tensor
    with torch.no_grad():
        for name, tensor in converted.items():
            parameters[name].copy_(tensor)
    _check_locked(init, student, converted)
    return InitReport(
        init=init,
        layout=weights.layout + (f", {weights.note}" if weights.note else ""),
        used=sorted(set(keys.values())),
        resized=sorted(resized),
        ignored=sorted(weights.ignored),
        random=sorted(name for name, _ in student.named_parameters() if name not in converted),
    )


def _check_locked(init: str, student: Student, converted: dict[str, Tensor]) -> None:
    random = [tower for tower in TOWERS if tower != "text" or not student.text.pretrained]
    for name, parameter in student.named_parameters():
        is_locked = name.partition(".")[0] in random and not parameter.requires_grad
        if is_locked and name not in converted:
            raise ConfigError(
                f"--init is {init}, which has no {name}, but the recipe locks it, so that it would "
                "stay random; give weights of both towers, or set optimizer.text.lr_scale above 0"
            )


def _check_facts(init: str, facts: TowerFacts, student: Student) -> None:
    """The number of heads and the activation change what a tower computes, but no shape."""
    ours = tower_facts(student)
    for field_name, built, trained in (
        ("model.image.kwargs.num_heads", ours.image_heads, facts.image_heads),
        ("model.text.heads", ours.text_heads, facts.text_heads),
    ):
        if trained not in (None, built):
            raise ConfigError(
                f"--init is {init}, whose tower has {trained} heads, but the recipe builds {built};"
                f" set {field_name}={trained}"
            )
    if facts.image_activation not in (None, ours.image_activation):
        raise ConfigError(
            f"--init is {init}, whose image tower has {facts.image_activation}, but "
            f"the recipe's has {ours.image_activation}; take a tower of timm's with the former as "
            "model.image.name"
        )


def _convert(
    init: str, weights: InitialWeights, parameters: dict[str, nn.Parameter]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors by aclip's names, and the file's key of each."""
    converted, keys = {}, {}
    for key, tensor in weights.tensors.items():
        if key in weights.ignored:
            continue
        parts = weights.convert(key, tensor)
        if parts is None or not parts.keys() <= parameters.keys():
            raise ConfigError(
                f"--init is {init}, a {weights.layout} with the key {key}, which no part of the "
                "recipe's towers holds; use the towers of that model (model.image, model.text)"
            )
        converted |= parts
        keys |= dict.fromkeys(parts, key)
    prefix = IMAGE_TOWER if weights.image_only else ""
    missing = sorted(n for n in parameters if n.startswith(prefix) and n not in converted)
    if missing:
        raise ConfigError(
            f"--init is {init}, a {weights.layout} that lacks {missing[0]} and "
            f"{len(missing) - 1} more of the recipe's {len(parameters)} tensors; use the towers of "
            "that model (model.image, model.text)"
        )
    return converted, keys


def _resize(
    init: str, key: str, name: str, tensor: Tensor, parameter: nn.Parameter, num_prefix: int
) -> Tensor:
    """Positions for another grid or a shorter context; other shapes can't be changed.

    Args:
        num_prefix: how many of the image tower's positions are those of no patch.
    """
    ours, theirs = list(parameter.shape), list(tensor.shape)
    if name == IMAGE_POSITIONS:
        resized = resize_image_positions(tensor, parameter.shape, num_prefix)
        if resized is not None:
            return resized
    if name == TEXT_POSITIONS and theirs[0] > ours[0] and theirs[1:] == ours[1:]:
        # A caption that fits the shorter context reads the same rows.
        return tensor[: ours[0]]
    raise ConfigError(
        f"--init is {init}, where {key} is {theirs}, but the recipe builds {ours} for it; use the "
        "towers of that model (model.image, model.text, model.embed_dim)"
    )


def resize_image_positions(tensor: Tensor, shape: torch.Size, num_prefix: int) -> Tensor | None:
    """Positions (1, p + g * g, C) for another grid, fp32, bicubic; None if they are not such, or of
    another width.

    Args:
        shape: (1, p + h * h, C).
        num_prefix: p, how many of the positions are those of no patch.
    """
    if tensor.ndim != len(shape) or tensor.shape[-1] != shape[-1]:
        return None
    if not _is_square(tensor.shape[1] - num_prefix):
        return None
    side = round((shape[1] - num_prefix) ** 0.5)
    return resample_abs_pos_embed(tensor.float(), [side, side], num_prefix_tokens=num_prefix)


def _is_square(number: int) -> bool:
    return round(number**0.5) ** 2 == number
