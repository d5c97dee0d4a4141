"""The command line of `launch/pretrain.py`, which the scripts for several nodes read too."""

import argparse
import json
from pathlib import Path

from aclip.config.recipe import Recipe
from aclip.config.recipe_file import load_recipe
from aclip.errors import ConfigError

DEMO = "demo"
WORDS_OF_OPEN_CLIP = {
    "--train-data": "--train",
    "--val-data": "--val",
    "--train-data-upsampling-factors": "data.sources=[{shards: ..., weight: ...}, ...]",
    "--train-num-samples": "a sizes.json beside the shards, or nothing: they are counted",
    "--batch-size": "train.global_batch_size=..., which counts all ranks together",
    "--epochs": "train.epochs=...",
    "--warmup": "train.warmup_epochs=...",
    "--lr": "optimizer.lr=...",
    "--wd": "optimizer.weight_decay=...",
    "--workers": "data.workers=...",
    "--seed": "train.seed=...",
    "--model": "--recipe",
    "--pretrained": "--init",
    "--imagenet-val": "--val with shards of it, or launch/evaluate.py",
}
"""Options of open_clip's trainer, and what stands for them here."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        words = {word.partition("=")[0].replace("_", "-") for word in message.split()}
        hints = [
            f"for {word} of open_clip write {ours}"
            for word, ours in WORDS_OF_OPEN_CLIP.items()
            if word in words
        ]
        super().error("; ".join([message, *hints]))


def parser() -> argparse.ArgumentParser:
    """The parser of pretrain.py's arguments; call its parse_intermixed_args."""
    parser = _Parser(prog="pretrain.py", description="Pre-train a CLIP-style model on DeepSpeed.")
    parser.add_argument("--ds_config", required=True, help="DeepSpeed JSON, see ds_configs/")
    parser.add_argument(
        "--recipe", default=DEMO, help="name of a recipe or path to a YAML file (default: demo)"
    )
    parser.add_argument("--train", help="training shards; the same as data.train=...")
    parser.add_argument("--val", help="validation shards; the same as data.val=...")
    parser.add_argument("--output", help="run folder (default: runs/<recipe>)")
    parser.add_argument(
        "--resume",
        default="auto",
        help="auto: continue the run in --output; none: start new; or a checkpoint's path",
    )
    parser.add_argument(
        "--init",
        help="weights that a new run starts from: a SLIP or A-CLIP checkpoint, open_clip folder, "
        "a run, or timm:NAME_OR_FILE for the image tower; the same as model.init=...",
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument(
        "overrides", nargs="*", metavar="key.sub=value", help="recipe values to change"
    )
    return parser


def parse(words: list[str]) -> argparse.Namespace:
    """The arguments that another script passes on to pretrain.py.

    Raises:
        ConfigError: one of them is not pretrain.py's.
    """
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
    if arguments.train:
        overrides.append(f"data.train={json.dumps(arguments.train)}")
        if arguments.recipe == DEMO and not arguments.val:
            overrides.append("data.val=[]")
    if arguments.val:
        overrides.append(f"data.val={json.dumps(arguments.val)}")
    if arguments.init:
        overrides.append(f"model.init={json.dumps(arguments.init)}")
    return load_recipe(arguments.recipe, overrides)


def run_folder(arguments: argparse.Namespace) -> Path:
    return Path(arguments.output or f"runs/{Path(arguments.recipe).stem}")
