"""Pre-trains a recipe: `deepspeed launch/pretrain.py --ds_config ds_configs/zero2.json`."""

import sys

from aclip.cli import run_reporting_errors


def main() -> int:
    from aclip.config.arguments import parser, refuse_other_trainers_options

    refuse_other_trainers_options(sys.argv[1:])
    arguments = parser().parse_intermixed_args()
    # Imported here so that --help answers at once.
    from aclip.training.pretrain import pretrain

    return pretrain(arguments)


if __name__ == "__main__":
    run_reporting_errors(main)
