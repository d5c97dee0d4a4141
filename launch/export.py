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
    parser.add_argument(
        "--license", help="of the weights, as the Hub calls it, such as apache-2.0, for the card"
    )
    parser.add_argument(
        "--picture",
        type=path,
        help="a picture for the card, such as figure.png of launch/visualize.py (default: the "
        "run's kept patches if its data are the built-in scenes, else none)",
    )
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    # Imported here so that --help answers at once.
    from aclip.weights.card.options import CardOptions
    from aclip.weights.export import export

    options = CardOptions(
        license=arguments.license, picture=arguments.picture, sample_flops=_sample_flops
    )
    export(arguments, options)


def _sample_flops(recipe, num_samples: float) -> float:
    # Imported when the card is written: the parts of a step take seconds, which no wrong input
    # should cost.
    from aclip.planning.run_flops import sample_flops

    return sample_flops(recipe, num_samples)


if __name__ == "__main__":
    run_reporting_errors(main)
