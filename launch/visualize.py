"""Shows what a checkpoint attends to and keeps: `python launch/visualize.py runs/demo`."""

import argparse

from aclip.cli import path, run_reporting_errors


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Draw images, the teacher's attention, the kept patches of the student views "
        "and a random mask, as PNG files and as one HTML page."
    )
    parser.add_argument(
        "checkpoint", type=path, help="a checkpoint's folder, or a run's for its latest"
    )
    parser.add_argument(
        "images",
        nargs="*",
        type=path,
        help="image files, folders of them, or .tar shards; the first eight images are drawn "
        "(default: the run's validation set, or the built-in scenes where it has none)",
    )
    parser.add_argument(
        "--out",
        "--output",
        type=path,
        help="folder to write (default: figure, in the run's folder)",
    )
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    # Imported here so that --help answers at once.
    from aclip.reports.visualize import visualize

    visualize(arguments)


if __name__ == "__main__":
    run_reporting_errors(main)
