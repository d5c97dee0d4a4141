"""Predicts the time of a step on a GPU: `python launch/roofline.py --gpu h100 --against
open_clip`. Needs no GPU, and measures none."""

import argparse

from aclip.cli import DefaultsShown, path, run_reporting_errors


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Launches, bytes and FLOPs of a step by part, counted on this machine, and the "
        "time that follows on one GPU.",
        formatter_class=DefaultsShown,
    )
    parser.add_argument(
        "recipes",
        nargs="*",
        type=path,
        default=["clip_vitb16", "aclip_vitb16", "aclip_eff_vitb16"],
        help="names of recipes or YAML files",
    )
    parser.add_argument("--gpu", required=True, help="such as a100-80 or h100")
    parser.add_argument(
        "--ds_config", type=path, default="ds_configs/zero2.json", help="DeepSpeed JSON"
    )
    parser.add_argument(
        "--batch_sizes", type=int, nargs="+", default=[64, 128, 512], help="images of a step"
    )
    parser.add_argument(
        "--against",
        choices=["open_clip"],
        help="also predict open_clip's step with the towers of the first recipe",
    )
    parser.add_argument(
        "--caption_tokens",
        type=float,
        default=22,
        help="mean length of a whole caption in tokens, start and end included",
    )
    parser.add_argument(
        "--set",
        nargs="*",
        default=[],
        metavar="key.sub=value",
        help="recipe values to change in every recipe",
    )
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    # Imported here so that --help answers at once.
    from aclip.planning.roofline import roofline

    return roofline(arguments)


if __name__ == "__main__":
    run_reporting_errors(main)
