"""Evaluates a model: `python launch/evaluate.py runs/demo --suite scenes`."""

import argparse

from aclip.cli import path, run_reporting_errors


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Zero-shot classification, retrieval and linear probe of a model; alone or "
        "under the deepspeed launcher."
    )
    parser.add_argument(
        "checkpoint",
        type=path,
        help="a run or checkpoint, a SLIP or A-CLIP file, an open_clip folder, an aclip export, or "
        "hf-hub:OWNER/NAME[@REVISION]",
    )
    parser.add_argument(
        "--suite",
        nargs="+",
        required=True,
        type=path,
        help="paper (the 26 sets, Flickr30K and COCO), scenes (built in), names of sets, folders",
    )
    parser.add_argument("--data", type=path, help="folder of the papers' sets")
    parser.add_argument(
        "--download", action="store_true", help="fetch what torchvision can download to --data"
    )
    parser.add_argument(
        "--model",
        choices=["teacher", "student"],
        help="which of a run's two (default: the teacher if there is one)",
    )
    parser.add_argument(
        "--recipe", type=path, help="whose towers a file has that does not record them"
    )
    parser.add_argument(
        "--slip_checkout",
        type=path,
        help="checkout of facebookresearch/SLIP whose prompts are taken",
    )
    parser.add_argument(
        "--linear_probe",
        action="store_true",
        help="also fit a linear probe on sets with a train split",
    )
    parser.add_argument("--batch_size", type=int, default=256, help="images of a call on a rank")
    parser.add_argument(
        "--published", default="aclip-25", help="row of the paper that is set beside ours"
    )
    parser.add_argument(
        "--output",
        "--out",
        type=path,
        help="folder for results.json and results.md (default: for a run or checkpoint, one in "
        "evaluation/ of the run's folder; else runs/evaluation/NAME)",
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    # Imported here so that --help answers at once.
    from aclip.evaluation.evaluate import evaluate

    return evaluate(arguments)


if __name__ == "__main__":
    run_reporting_errors(main)
