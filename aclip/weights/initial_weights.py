"""Where a new run starts from: `model.init`, weights of other runs and projects.

Each format's names are in aclip/weights/formats/; here a file is recognised, matched with the
student that the recipe builds, and what happened to every key is reported.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import timm
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from aclip.errors import ConfigError
from aclip.files import expand_home
from aclip.models.student import Student
from aclip.run_folder.checkpoint_folder import locate
from aclip.weights.checkpoint_weights import load_checkpoint_weights
from aclip.weights.formats import open_clip, plain, slip
from aclip.weights.names import TowerFacts, tower_facts
from aclip.weights.tensors_file import read_tensors

TIMM = "timm:"
IMAGE_TOWER = "image.vit."
IMAGE_POSITIONS = "image.vit.pos_embed"
TEXT_POSITIONS = "text.transformer.embeddings.position_embedding.weight"
_CLASSIFIER = ("head.", "head_dist.", "pre_logits.")
Convert = Callable[[str, Tensor], dict[str, Tensor] | None]


@dataclass(frozen=True)
class InitialWeights:
    """Weights of one format.

    Attributes:
        layout: the format, in words.
        tensors: the tensors by the file's names.
        convert: renames one of them to aclip's names; None if it has no counterpart.
        ignored: names that exist only for training or for a classifier.
        facts: what must agree with the recipe's towers besides shapes.
        image_only: no text tower is expected.
    """

    layout: str
    tensors: dict[str, Tensor]
    convert: Convert
    ignored: set[str] = field(default_factory=set)
    facts: TowerFacts = TowerFacts()
    image_only: bool = False


@dataclass(frozen=True)
class InitReport:
    """What became of every key.

    Attributes:
        init: the recipe's model.init.
        layout: the format that was recognised.
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
        init: a SLIP or A-CLIP checkpoint, an open_clip `local-dir` folder, a checkpoint, run folder
            or safetensors export of aclip; or `timm:` with a file or a pretrained model's name,
            for the image tower alone.

    Raises:
        ConfigError: nothing such is there, or its keys, shapes or heads are not the recipe's.
    """
    weights = _open(init)
    _check_heads(init, weights.facts, student)
    parameters = student.model_parameters()
    converted, keys = _convert(init, weights, parameters)
    resized = []
    for name, tensor in converted.items():
        if tensor.shape != parameters[name].shape:
            tensor = _resize(init, keys[name], name, tensor, parameters[name])
            resized.append(keys[name])
        converted[name] = tensor
    with torch.no_grad():
        for name, tensor in converted.items():
            parameters[name].copy_(tensor)
    return InitReport(
        init=init,
        layout=weights.layout,
        used=sorted(set(keys.values())),
        resized=sorted(resized),
        ignored=sorted(weights.ignored),
        random=sorted(name for name, _ in student.named_parameters() if name not in converted),
    )


def _open(init: str) -> InitialWeights:
    init = expand_home(init, "--init")
    try:
        if init.startswith(TIMM):
            return _open_timm(init.removeprefix(TIMM))
        path = Path(init.removeprefix("local-dir:"))
        if not path.exists():
            raise ValueError("does not exist")
        return _open_folder(path) if path.is_dir() else _open_file(path)
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"--init is {init}, which {error}; give a SLIP or A-CLIP checkpoint, an open_clip "
            "local-dir folder, a run of aclip, or timm: with a file or name"
        ) from None


def _open_timm(name_or_path: str) -> InitialWeights:
    if Path(name_or_path).is_file():
        tensors = read_tensors(Path(name_or_path))
        facts = TowerFacts()
    elif timm.is_model(name_or_path):
        try:
            vit = timm.create_model(name_or_path, pretrained=True, num_classes=0)
        except (RuntimeError, OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"timm can't fetch ({reason})") from None
        if not hasattr(vit, "blocks"):
            raise ValueError("is no VisionTransformer")
        tensors, facts = vit.state_dict(), TowerFacts(image_heads=vit.blocks[0].attn.num_heads)
    else:
        raise ValueError("is neither a file nor a model that timm knows")
    ignored = {key for key in tensors if key.startswith(_CLASSIFIER)}
    return InitialWeights("timm image tower", tensors, _from_timm, ignored, facts, image_only=True)


def _open_folder(path: Path) -> InitialWeights:
    if (path / open_clip.CONFIG).is_file():
        facts = open_clip.read_config(path)
        for name in open_clip.WEIGHT_FILES:
            if (path / name).is_file():
                tensors = read_tensors(path / name)
                ignored = tensors.keys() & open_clip.BUFFERS
                convert = open_clip.from_open_clip
                return InitialWeights("open_clip folder", tensors, convert, ignored, facts)
        raise ValueError(f"holds no {open_clip.WEIGHTS}")
    if locate(path) is None:
        raise ValueError("is neither an open_clip folder nor a run")
    weights = load_checkpoint_weights(str(path), None)
    facts = tower_facts(weights.student)
    return InitialWeights(f"aclip {weights.model}", weights.state, plain.from_plain, facts=facts)


def _open_file(path: Path) -> InitialWeights:
    tensors = read_tensors(path)
    if plain.is_plain(tensors):
        return InitialWeights(
            "aclip weights", tensors, plain.from_plain, facts=plain.read_facts(path)
        )
    if slip.is_released(tensors):
        has_average = any(key.startswith(slip.EMA) for key in tensors)
        return InitialWeights(
            "A-CLIP checkpoint" if has_average else "SLIP checkpoint",
            tensors,
            slip.from_released,
            slip.training_only(tensors),
            slip.facts(tensors),
        )
    raise ValueError("has keys of no known layout")


def _from_timm(key: str, tensor: Tensor) -> dict[str, Tensor]:
    return {IMAGE_TOWER + key: tensor}


def _check_heads(init: str, facts: TowerFacts, student: Student) -> None:
    """The number of heads changes what a tower computes but no shape."""
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


def _resize(init: str, key: str, name: str, tensor: Tensor, parameter: nn.Parameter) -> Tensor:
    """Positions for another grid or a shorter context; other shapes can't be changed."""
    ours, theirs = list(parameter.shape), list(tensor.shape)
    if len(ours) == len(theirs) and ours[-1] == theirs[-1]:
        if name == IMAGE_POSITIONS and _is_square(theirs[1] - 1):
            side = round((ours[1] - 1) ** 0.5)
            return resample_abs_pos_embed(tensor.float(), [side, side])
        if name == TEXT_POSITIONS and theirs[0] > ours[0]:
            # A caption that fits the shorter context reads the same rows.
            return tensor[: ours[0]]
    raise ConfigError(
        f"--init is {init}, where {key} is {theirs}, but the recipe builds {ours} for it; use the "
        "towers of that model (model.image, model.text, model.embed_dim)"
    )


def _is_square(number: int) -> bool:
    return round(number**0.5) ** 2 == number
