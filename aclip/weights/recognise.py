"""Recognises weights of other runs and projects: the format, by names of files and keys.

Each format's names are in aclip/weights/formats/; what is no weights at all is told by
first_look.py.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from aclip.files import expand_home
from aclip.weights.checkpoint_weights import load_checkpoint_weights
from aclip.weights.find_named import find_named
from aclip.weights.first_look import TIMM, Found, find_weights, refusal_of_init
from aclip.weights.formats import dual_encoder, open_clip, open_clip_run, plain, slip
from aclip.weights.names import TowerFacts, tower_facts
from aclip.weights.tensors_file import read_tensors
from aclip.weights.timm_weights import fetch_timm_model

IMAGE_TOWER = "image.vit."
_CLASSIFIER = ("head.", "head_dist.", "pre_logits.")
_TIMM_KEY = "patch_embed.proj.weight"
_MOST_KEYS = 3
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
        note: what had to be assumed, in words; empty for nothing.
    """

    layout: str
    tensors: dict[str, Tensor]
    convert: Convert
    ignored: set[str] = field(default_factory=set)
    facts: TowerFacts = TowerFacts()
    image_only: bool = False
    note: str = ""


def open_weights(init: str) -> InitialWeights:
    """Opens what `model.init` names.

    Raises:
        ConfigError: nothing such is there, or its keys are of no known layout.
    """
    named = expand_home(init, "--init")
    try:
        if named.startswith(TIMM):
            return _open_timm(named.removeprefix(TIMM))
        return open_found(find_named(named))
    except ValueError as error:
        raise refusal_of_init(init, error) from None


def open_found(found: Found) -> InitialWeights:
    """Opens weights whose place is known.

    Raises:
        ConfigError: a checkpoint of a run is damaged.
        ValueError: a file holds no weights, or keys of no known layout; the message ends a sentence
            that begins with the path.
    """
    if found.kind == "checkpoint":
        weights = load_checkpoint_weights(str(found.path), found.model)
        facts = tower_facts(weights.student)
        return InitialWeights(
            f"aclip {weights.model}", weights.state, plain.from_plain, facts=facts
        )
    if found.kind == "open_clip":
        facts = open_clip.read_config(found.path)
        return _open_clip("open_clip folder", read_tensors(found.weights), facts)
    if found.kind == "huggingface":
        state = dual_encoder.from_dual_encoder(read_tensors(found.weights))
        facts = dual_encoder.read_facts(found.path)
        return InitialWeights("Hugging Face folder", state, plain.from_plain, facts=facts)
    return _open_file(found.path)


def _open_file(path: Path) -> InitialWeights:
    tensors = read_tensors(path)
    if plain.is_plain(tensors):
        # A checkpoint's own file, copied elsewhere, holds heads too.
        ignored = {key for key in tensors if not plain.is_of_model(key)}
        return InitialWeights(
            "aclip weights", tensors, plain.from_plain, ignored, plain.read_facts(path)
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
    if open_clip.is_open_clip(tensors):
        facts = open_clip_run.read_facts(path)
        weights = _open_clip("open_clip checkpoint", tensors, facts)
        if facts == TowerFacts():
            note = "with the recipe's heads and activations, which the file does not tell"
            return replace(weights, note=note)
        return weights
    if _TIMM_KEY in tensors:
        raise ValueError(f"has the keys of a timm image tower; write {TIMM}{path} to use it as one")
    if dual_encoder.is_of_hugging_face(tensors):
        raise ValueError("has Hugging Face's keys; give the whole folder, since it tells the heads")
    keys = sorted(tensors)
    more = f" and {len(keys) - _MOST_KEYS} more" if len(keys) > _MOST_KEYS else ""
    raise ValueError(f"has keys of no known layout ({', '.join(keys[:_MOST_KEYS])}{more})")


def _open_clip(layout: str, tensors: dict[str, Tensor], facts: TowerFacts) -> InitialWeights:
    ignored = tensors.keys() & open_clip.BUFFERS
    return InitialWeights(layout, tensors, open_clip.from_open_clip, ignored, facts)


def _open_timm(name_or_path: str) -> InitialWeights:
    if Path(name_or_path).exists():
        path = Path(name_or_path)
        if path.is_dir():
            raise ValueError("is a folder; give the file of weights in it")
        find_weights(path)
        tensors, facts = read_tensors(path), TowerFacts()
    else:
        tensors, facts = fetch_timm_model(name_or_path)
    ignored = {key for key in tensors if key.startswith(_CLASSIFIER)}
    return InitialWeights("timm image tower", tensors, _from_timm, ignored, facts, image_only=True)


def _from_timm(key: str, tensor: Tensor) -> dict[str, Tensor]:
    return {IMAGE_TOWER + key: tensor}
