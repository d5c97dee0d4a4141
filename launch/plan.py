"""Plans a run: `python launch/plan.py --recipe aclip_vitb16 --ds_config ds_configs/zero2.json
--gpu h100 --gpus_per_node 8`. Needs no GPU."""

import argparse

from aclip.cli import path, run_reporting_errors


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Memory, the largest micro-batch, time and communication of a run."
    )
    parser.add_argument(
        "--ds_config", required=True, type=path, help="DeepSpeed JSON, see ds_configs/"
    )
    parser.add_argument(
        "--recipe",
        default="demo",
        type=path,
        help="name of a recipe or path to a YAML file (default: demo)",
    )
    parser.add_argument("--gpu", required=True, help="such as a100-80 or h100")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus_per_node", type=int, default=8)
    parser.add_argument(
        "--mfu",
        type=float,
        help="share of the peak FLOPs that is reached (default: the time of a step is predicted)",
    )
    parser.add_argument(
        "--bandwidth",
        type=float,
        help="GB/s that a GPU sends (default: its link; with more nodes 25, a 200 Gb/s adapter)",
    )
    parser.add_argument(
        "--samples", type=float, default=15e6, help="images of an epoch (default: YFCC-15M)"
    )
    parser.add_argument(
        "--caption_tokens",
        type=float,
        default=22,
        help="mean length of a whole caption in tokens, start and end included",
    )
    parser.add_argument(
        "--image_pixels",
        type=float,
        default=500 * 375,
        help="mean number of pixels of an image in the shards, which lies on the GPU with "
        "data.crops=device",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key.sub=value", help="recipe values to change"
    )
    return parser.parse_intermixed_args()


def main() -> None:
    arguments = parse_arguments()
    # Imported here so that --help answers at once, and wrong input before the towers' packages.
    from aclip.planning.plan_input import read_input

    given = read_input(arguments)
    from aclip.planning.plan import plan
    from aclip.planning.plan_report import report

    print(report([plan(stage) for stage in given]))


if __name__ == "__main__":
    run_reporting_errors(main)
