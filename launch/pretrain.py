"""Pre-trains a recipe: `deepspeed launch/pretrain.py --ds_config ds_configs/zero2.json`."""

import argparse

from aclip.errors import run_reporting_errors


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Pre-train a CLIP-style model on DeepSpeed.")
    parser.add_argument("--ds_config", required=True, help="DeepSpeed JSON, see ds_configs/")
    parser.add_argument(
        "--recipe", default="demo", help="name of a recipe or path to a YAML file (default: demo)"
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
    return parser.parse_intermixed_args()


def main() -> int:
    arguments = parse_arguments()
    # Imported here so that --help answers at once.
    from aclip.run import pretrain

    return pretrain(arguments)


if __name__ == "__main__":
    run_reporting_errors(main)
