"""The command line of `launch/pretrain.py`, which the scripts for several nodes read too."""

import argparse
import json
from pathlib import Path

from aclip.cli import path
from aclip.config.recipe import Recipe
from aclip.config.recipe_file import load_recipe
from aclip.errors import ConfigError

DEMO = "demo"
_DS_CONFIG = "--ds_config FILE"
ELSEWHERE = {
    "--ds-config": _DS_CONFIG,
    "--deepspeed": _DS_CONFIG,
    "--deepspeed_config": _DS_CONFIG,
    "--deepspeed-config": _DS_CONFIG,
    "--train-data": "--train SHARDS",
    "--val-data": "--val SHARDS",
    "--dataset-resampled": "data.sources=[...], which says how data sets are mixed",
    "--train-data-upsampling-factors": "data.sources=[{shards: ..., weight: ...}, ...]",
    "--imagenet-val": "--val SHARDS, or launch/evaluate.py",
    "--train-num-samples": "nothing: samples are counted, or read from sizes.json",
    "--epochs": "train.epochs=N",
    "--batch-size": "train.global_batch_size=N (all ranks together)",
    "--batch_size": "train.global_batch_size=N (all ranks together)",
    "--lr": "optimizer.lr=X",
    "--wd": "optimizer.weight_decay=X",
    "--warmup": "train.warmup_epochs=X",
    "--seed": "train.seed=N",
    "--workers": "data.workers=N (of a rank)",
    "--precision": "bf16.enabled in the ds_config",
    "--grad-checkpointing": "model.image.recompute=blocks and model.text.recompute=blocks",
    "--model": "--recipe NAME_OR_FILE",
    "--config": "--recipe NAME_OR_FILE",
    "--pretrained": "--init WEIGHTS",
    "--logs": "--output FOLDER",
    "--output-dir": "--output FOLDER",
    "--output_dir": "--output FOLDER",
    "--resume_from_checkpoint": "--resume PATH",
    "--wandb": "train.wandb=PROJECT",
    "--report-to": "train.wandb=PROJECT",
}
"""Options of open_clip and of trainers on DeepSpeed, and what says the same here."""


def parser() -> argparse.ArgumentParser:
    """The parser of pretrain.py's arguments; call its parse_intermixed_args."""
    parser = argparse.ArgumentParser(
        prog="pretrain.py", description="Pre-train a CLIP-style model on DeepSpeed."
    )
    parser.add_argument(
        "--ds_config", required=True, type=path, help="DeepSpeed JSON, see ds_configs/"
    )
    parser.add_argument(
        "--recipe",
        default=DEMO,
        type=path,
        help="name of a recipe or path to a YAML file (default: demo)",
    )
    parser.add_argument("--train", help="training shards; the same as data.train=...")
    parser.add_argument("--val", help="validation shards; the same as data.val=...")
    parser.add_argument("--output", type=path, help="run folder (default: runs/<recipe>)")
    parser.add_argument(
        "--resume",
        default="auto",
        type=path,
        help="where a new run in --output begins: none for new weights, or a checkpoint's path; "
        "with auto, and with the same word again, the run in --output continues",
    )
    parser.add_argument(
        "--allow_changes",
        action="store_true",
        help="continue the run in --output with other settings than it was trained with",
    )
    parser.add_argument(
        "--init",
        help="weights that a new run starts from: a SLIP or A-CLIP checkpoint, open_clip folder, "
        "a run, hf-hub:OWNER/NAME[@REVISION], or timm:NAME_OR_FILE for the image tower; the same "
        "as model.init=...",
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument(
        "overrides", nargs="*", metavar="key.sub=value", help="recipe values to change"
    )
    return parser


def refuse_other_trainers_options(words: list[str]) -> None:
    """Raises ConfigError for an option that another trainer has, with what it is called here."""
    for word in words:
        name = word.split("=")[0]
        if name in ELSEWHERE:
            raise ConfigError(
                f"{name} is not an option of pretrain.py; here it is {ELSEWHERE[name]}"
            )


def parse(words: list[str]) -> argparse.Namespace:
    """The arguments that another script passes on to pretrain.py.

    Raises:
        ConfigError: one of them is not pretrain.py's.
    """
    refuse_other_trainers_options(words)
    arguments, unknown = parser().parse_known_intermixed_args(words)
    if unknown:
        raise ConfigError(f"{unknown[0]} is not an argument of pretrain.py; see its --help")
    return arguments


def read_recipe(arguments: argparse.Namespace) -> Recipe:
    """The recipe that the arguments ask for.

    Raises:
        ConfigError: see load_recipe.
    """
    overrides = list(arguments.overrides)
    if arguments.recipe == DEMO and _names_own_data(arguments):
        # The built-in scenes go; what is given comes behind and wins.
        overrides = ["data.train=[]", *overrides]
    if arguments.train:
        overrides.append(f"data.train={json.dumps(arguments.train)}")
    if arguments.val:
        overrides.append(f"data.val={json.dumps(arguments.val)}")
    if arguments.init:
        overrides.append(f"model.init={json.dumps(arguments.init)}")
    return load_recipe(arguments.recipe, overrides)


def _names_own_data(arguments: argparse.Namespace) -> bool:
    keys = ("data.train=", "data.sources=")
    given = [word for word in arguments.overrides if word.startswith(keys)]
    return bool(arguments.train) or any(word != f"data.train={DEMO}" for word in given)


def run_folder(arguments: argparse.Namespace) -> Path:
    return Path(arguments.output or f"runs/{Path(arguments.recipe).stem}")
