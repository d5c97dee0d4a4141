"""The cost of a step, recipe by recipe, on this machine: `python launch/benchmark.py`; of loading
the data: `python launch/benchmark.py --loader`; how often each sample comes:
`python launch/benchmark.py --dealing`; how long a checkpoint stops a run:
`python launch/benchmark.py --saving 1 2`."""

import argparse

from aclip.cli import DefaultsShown, path, run_reporting_errors

LARGE, SMALL = ["aclip_vitl16"], ["aclip_vits16"]
PAPER = ["clip_vitb16", "slip_vitb16", "maskclip_vitb16", "aclip_vitb16", "aclip_eff_vitb16"]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Time and memory of one training step of each recipe, interleaved in one run; "
        "or, with --loader, of loading; or, with --dealing, how often each sample comes; or, with "
        "--saving, how long a checkpoint stops a run.",
        formatter_class=DefaultsShown,
    )
    parser.add_argument(
        "recipes",
        nargs="*",
        type=path,
        help="names of recipes or YAML files (default: the paper's table; with --scaling "
        "ViT-L/16, with --saving ViT-S/16)",
    )
    parser.add_argument(
        "--baseline", type=path, help="the recipe that counts as 1 (default: the first)"
    )
    parser.add_argument(
        "--against",
        choices=["open_clip"],
        help="also time open_clip with the towers of the first recipe, plain and with half "
        "of the patches dropped",
    )
    parser.add_argument(
        "--batch_size",
        type=int,
        help="images of a step (default: 8, on a GPU 128); with --scaling of a rank (on a GPU 64)",
    )
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each system")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU, where there is no GPU")
    parser.add_argument(
        "--rebuild",
        action="store_true",
        help="build each system anew for its turn, where memory does not hold all of them",
    )
    parser.add_argument("--json", type=path, help="file for the figures")
    parser.add_argument(
        "--set",
        nargs="*",
        default=[],
        metavar="key.sub=value",
        help="recipe values to change in every recipe",
    )
    loader = parser.add_argument_group("with --loader")
    loader.add_argument(
        "--loader",
        action="store_true",
        help="time this loader, open_clip's and a plain one instead of steps",
    )
    loader.add_argument("--shards", type=path, help="to read (default: pictures made for it)")
    loader.add_argument("--images", type=int, default=256, help="of each loader in a round")
    loader.add_argument(
        "--gpu_rate", type=float, default=2900, help="images a second that one GPU trains on"
    )
    loader.add_argument("--run", type=path, help="folder of a run whose data-wait share to print")
    dealing = parser.add_argument_group("with --dealing")
    dealing.add_argument(
        "--dealing",
        action="store_true",
        help="deal the samples of a run to its lanes, from sizes alone, and count what comes",
    )
    dealing.add_argument(
        "--sizes",
        nargs="*",
        default=[],
        metavar="SHARDSxSAMPLES",
        help="data sets, at --batch_size (4096) (default: common ones and the demo's)",
    )
    dealing.add_argument("--epochs", type=int, default=25)
    dealing.add_argument("--ranks", type=int, default=64)
    dealing.add_argument("--workers", type=int, default=8, help="of each rank")
    saving = parser.add_argument_group("with --saving")
    saving.add_argument(
        "--saving",
        type=int,
        nargs="+",
        metavar="RANKS",
        help="save checkpoints on so many ranks, under each ZeRO stage",
    )
    saving.add_argument(
        "--saved_in", default=".", type=path, help="folder on the disk that they are written to"
    )
    scaling = parser.add_argument_group("scaling over the slots of a hostfile")
    scaling.add_argument(
        "--scaling", metavar="HOSTFILE", type=path, help="measure 1, 2, 4, ... of its slots"
    )
    scaling.add_argument("--ds_config", default="ds_configs/zero2.json", type=path)
    scaling.add_argument("--steps", type=int, default=30, help="timed steps of each case")
    scaling.add_argument(
        "--out",
        "--output",
        default="scaling",
        type=path,
        help="folder for table, plot and figures",
    )
    scaling.add_argument("--master_port", type=int, default=29500)
    scaling.add_argument("--rsh", help="remote shell; see launch/multinode.sh --help")
    arguments = parser.parse_args()
    defaults = LARGE if arguments.scaling else SMALL if arguments.saving else PAPER
    arguments.recipes = arguments.recipes or (defaults)
    return arguments


def main() -> int:
    arguments = parse_arguments()
    # Imported here so that --help answers at once.
    from aclip.benchmarks.benchmark import benchmark

    return benchmark(arguments)


if __name__ == "__main__":
    run_reporting_errors(main)
