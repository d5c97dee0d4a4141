"""Reports on a run, or compares several: `python launch/report.py runs/demo [runs/other ...]`."""

import argparse

from aclip.cli import path, run_reporting_errors


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Write report.html and report.md: curves, evaluations, kept patches, recipe."
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", type=path, help="folder of a run")
    parser.add_argument(
        "--out",
        "--output",
        type=path,
        help="folder to write (default: of one run its own; of several, comparison)",
    )
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    # Imported here so that --help answers at once.
    from aclip.reports.report import report

    report(arguments)


if __name__ == "__main__":
    run_reporting_errors(main)
