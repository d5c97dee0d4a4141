"""Exports a checkpoint: `python launch/export.py runs/demo --format open_clip --out exported`."""

import argparse

from aclip.cli import path, run_reporting_errors


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Write a checkpoint's model for open_clip, Hugging Face or as safetensors."
    )
    parser.add_argument(
        "checkpoint", type=path, help="a checkpoint's folder, or a run's for its latest"
    )
    parser.add_argument(
        "--format", required=True, choices=["open_clip", "huggingface", "safetensors"]
    )
    parser.add_argument(
        "--out", "--output", required=True, type=path, help="folder to write; new or empty"
    )
    parser.add_argument(
        "--model",
        choices=["teacher", "student"],
        help="which of the two (default: the teacher if there is one)",
    )
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    # Imported here so that --help answers at once.
    from aclip.weights.export import export

    export(arguments)


if __name__ == "__main__":
    run_reporting_errors(main)
