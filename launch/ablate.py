"""The paper's mask table on your data: `python launch/ablate.py` trains its rows with several seeds
and compares them. The same command continues."""

import argparse
from pathlib import Path

from aclip.cli import DefaultsShown, path, run_reporting_errors


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train the rows of the paper's tables with several seeds on the same data, one "
        "process per free device, and write tables and curves.",
        formatter_class=DefaultsShown,
    )
    parser.add_argument(
        "--rows",
        nargs="+",
        default=["masks"],
        help="masks (the table of masks), systems (CLIP, SLIP, MaskCLIP, A-CLIP, A-CLIP-eff), "
        "rows by name, or a YAML file of your own rows and, behind it, names of some of them",
    )
    parser.add_argument(
        "--recipe",
        default="demo",
        type=path,
        help="gives towers, data, colours, optimizer and schedule of all rows",
    )
    parser.add_argument(
        "--ds_config",
        default="ds_configs/zero0.json",
        type=path,
        help="DeepSpeed JSON of all runs",
    )
    parser.add_argument("--keep_ratio", type=float, nargs="+", default=[0.5])
    parser.add_argument("--seeds", type=int, default=5, help="of each row")
    parser.add_argument(
        "--processes", type=int, help="at a time (default: one per free GPU, or per core)"
    )
    parser.add_argument(
        "--output",
        "--out",
        default="runs/ablation",
        type=path,
        help="folder of runs and report",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key.sub=value", help="recipe values to change in all rows"
    )
    arguments = parser.parse_intermixed_args()
    arguments.script = str(Path(__file__).with_name("pretrain.py"))
    return arguments


def main() -> int:
    arguments = parse_arguments()
    # Imported here so that --help answers at once.
    from aclip.ablation.ablate import ablate

    return ablate(arguments)


if __name__ == "__main__":
    run_reporting_errors(main)
