"""Methods compared on your data: `python launch/ablate.py` trains the rows of the paper's tables,
or your own, with several seeds and compares them. The same command continues, and several of them,
on other machines too, share the runs of one --output."""

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
        "--budget",
        choices=["samples", "flops", "time"],
        help="what a whole run of each row has as much of as one of --budget_row: samples, FLOPs, "
        "or seconds of its steps, measured first (default: each row is as long as its recipe says, "
        "which is equal samples unless a row has stages)",
    )
    parser.add_argument(
        "--budget_row", help="the row whose run the budget is, as its recipe says (default: first)"
    )
    parser.add_argument(
        "--lr_sweep",
        type=float,
        nargs="+",
        metavar="RATE",
        help="learning rates that are tried for each row, on a seed that is not reported; its runs "
        "get the best (default: that of the recipe)",
    )
    parser.add_argument(
        "--lr_sweep_share", type=float, default=1.0, help="length of the sweep's runs"
    )
    parser.add_argument(
        "--caption_tokens",
        type=float,
        default=17,
        help="mean length of a whole caption in tokens, start and end included, for the FLOPs",
    )
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
        "--keep_checkpoints", action="store_true", help="leave the last one of each finished run"
    )
    parser.add_argument(
        "--report_only",
        type=path,
        metavar="ablation.json",
        help="make the page of these results again in --output, and train nothing",
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
