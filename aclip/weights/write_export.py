"""Writes a model in the formats that launch/export.py knows."""

import json
from pathlib import Path

import yaml
from safetensors.torch import save_file

from aclip.config.public_values import public_name, public_values
from aclip.config.text_folder import record_text_folder
from aclip.errors import ConfigError
from aclip.run_folder.layout import RECIPE_FILE, TEXT_FOLDER
from aclip.weights.checkpoint_weights import CheckpointWeights
from aclip.weights.formats import open_clip, plain
from aclip.weights.names import tower_facts

SAVED_FROM = {"_name_or_path", "name_or_path", "tokenizer_file", "special_tokens_map_file"}
"""Keys under which transformers notes a place in a config."""


def write_export(folder: Path, out: Path, output_format: str, weights: CheckpointWeights) -> str:
    """Fills an empty folder, and returns how to load what is there.

    Args:
        out: where the folder will stand.

    Raises:
        ConfigError: the format can't hold the towers.
        NotWritten: the disk is full.
    """
    text = weights.recipe.model.text
    if text.name and output_format != "safetensors":
        raise ConfigError(
            f"--format is {output_format}, which holds CLIP's own text tower, but the run's is of "
            f"model.text.name; take --format safetensors"
        )
    write = {
        "open_clip": _write_open_clip,
        "huggingface": _write_huggingface,
        "safetensors": _write_plain,
    }[output_format]
    return write(folder, out, weights)


def _write_open_clip(folder: Path, out: Path, weights: CheckpointWeights) -> str:
    tensors = open_clip.to_open_clip(weights.state)
    # open_clip's own files are contiguous, and safetensors takes no transposed view.
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / open_clip.WEIGHTS, {"format": "pt"})
    pooling = weights.student.image.pooling
    config = open_clip.config(weights.recipe, pooling, out, weights.state)
    (folder / open_clip.CONFIG).write_text(json.dumps(config, indent=2))
    advice = f"load: open_clip.create_model_and_transforms('local-dir:{out.absolute()}')"
    if open_clip.has_portable_name(weights.recipe):
        return advice
    text = json.dumps(open_clip.timm_config(weights.recipe), indent=2)
    (folder / open_clip.TIMM_CONFIG).write_text(text)
    return (
        f"{advice}\nopen_clip can't pass model.image.kwargs or a resolution to timm, so the config "
        "names this folder: after a move, correct timm_model_name in open_clip_config.json "
        "(local-dir:/new/path, or hf-hub:owner/name)"
    )


def _write_huggingface(folder: Path, out: Path, weights: CheckpointWeights) -> str:
    # Imported here, since transformers takes seconds.
    from aclip.weights.formats import huggingface

    problem = huggingface.unsupported(weights.student)
    if problem is not None:
        raise ConfigError(
            f"--format is huggingface, but the image tower {weights.recipe.model.image.name} "
            f"{problem}; take --format open_clip"
        )
    huggingface.write(folder, weights.recipe, weights.student, weights.state)
    return (
        f"load (transformers >= 5): VisionTextDualEncoderModel.from_pretrained('{out}'), "
        f"VisionTextDualEncoderProcessor.from_pretrained('{out}')"
    )


def _write_plain(folder: Path, out: Path, weights: CheckpointWeights) -> str:
    plain.write(folder / plain.WEIGHTS, weights.state, tower_facts(weights.student))
    (folder / RECIPE_FILE).write_text(
        yaml.safe_dump(public_values(weights.recipe), sort_keys=False)
    )
    if weights.recipe.model.text.name:
        record_text_folder(weights.recipe.model.text, folder / TEXT_FOLDER)
        for path in (folder / TEXT_FOLDER).glob("*config.json"):
            _name_no_place(path)
    file = out / plain.WEIGHTS
    return f"load: safetensors.torch.load_file('{file}'), or launch/pretrain.py --init {file}"


def _name_no_place(path: Path) -> None:
    """Writes a JSON file anew without the paths that transformers notes where a model was saved."""
    values = json.loads(path.read_text(encoding="utf-8"))
    for key in SAVED_FROM & values.keys():
        if isinstance(values[key], str) and Path(values[key]).is_absolute():
            values[key] = public_name(values[key])
    path.write_text(json.dumps(values, indent=2), encoding="utf-8")
