"""A checkpoint as files that other software loads: the work behind launch/export.py."""

import argparse
import json
from pathlib import Path

from aclip.config.recipe_file import dump_recipe
from aclip.errors import ConfigError
from aclip.files import appearing_folder
from aclip.run_folder.layout import RECIPE_FILE
from aclip.weights.checkpoint_weights import CheckpointWeights, load_checkpoint_weights
from aclip.weights.formats import open_clip, plain
from aclip.weights.names import tower_facts
from aclip.weights.tensors_file import save_tensors


def export(arguments: argparse.Namespace) -> None:
    """Runs `launch/export.py` with its parsed arguments.

    The folder appears complete: it is written beside its place and renamed.

    Raises:
        ConfigError: no such checkpoint or model, --out is in use, or the format can't hold the
            towers.
        NotWritten: --out can't be written.
    """
    out = Path(arguments.out)
    _check_out(out)
    weights = load_checkpoint_weights(arguments.checkpoint, arguments.model)
    write = {
        "open_clip": _write_open_clip,
        "huggingface": _write_huggingface,
        "safetensors": _write_plain,
    }[arguments.format]
    with appearing_folder(out) as partial:
        advice = write(partial, out, weights)
    print(f"wrote the {weights.model} of {weights.folder} to {out}\n{advice}", flush=True)


def _check_out(out: Path) -> None:
    if out.is_dir() and any(out.iterdir()):
        raise ConfigError(f"--out is {out}, which is not empty; give a new folder")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out is {out}, which is a file; give a new folder")


def _write_open_clip(folder: Path, out: Path, weights: CheckpointWeights) -> str:
    tensors = open_clip.to_open_clip(weights.state)
    # open_clip's own files are contiguous, and safetensors takes no transposed view.
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_tensors(tensors, folder / open_clip.WEIGHTS, {"format": "pt"})
    config = open_clip.config(weights.recipe, out, weights.state)
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
    (folder / RECIPE_FILE).write_text(dump_recipe(weights.recipe))
    file = out / plain.WEIGHTS
    return f"load: safetensors.torch.load_file('{file}'), or launch/pretrain.py --init {file}"
