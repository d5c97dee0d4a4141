"""Checks the nodes of a run: `python launch/doctor.py hostfile --train ... --output ...`."""

import argparse

from aclip.cli import run_reporting_errors


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Check every node before a run: versions, GPUs, room, data, network."
    )
    parser.add_argument("--slots", type=int, default=1, help="ranks of this node, without hostfile")
    parser.add_argument("--master_addr", help="of the first node (default: its name)")
    parser.add_argument("--master_port", type=int, default=29500)
    parser.add_argument("--rsh", help="remote shell (default: ssh); see launch/multinode.sh --help")
    parser.add_argument("hostfile", nargs="?", help="(default: this node alone)")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of pretrain.py")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    # Imported here so that --help answers at once.
    from aclip.nodes.doctor import doctor

    return doctor(arguments)


if __name__ == "__main__":
    run_reporting_errors(main)
