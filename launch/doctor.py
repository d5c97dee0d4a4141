"""Checks the nodes of a run: `python launch/doctor.py hostfile --train ... --output ...`."""

import argparse

from aclip.cli import path, run_reporting_errors


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options] [HOSTFILE] [arguments of pretrain.py]",
        description="Check every node before a run: versions, GPUs, room, data, network. Without "
        "HOSTFILE, this node alone.",
        allow_abbrev=False,  # every other option is pretrain.py's
    )
    parser.add_argument("--slots", type=int, default=1, help="ranks of this node, without hostfile")
    parser.add_argument("--master_addr", help="of the first node (default: its name)")
    parser.add_argument("--master_port", type=int, default=29500)
    parser.add_argument("--rsh", help="remote shell (default: ssh); see launch/multinode.sh --help")
    # Not positional arguments: argparse would take the value of --train for the hostfile.
    arguments, others = parser.parse_known_args()
    has_hostfile = bool(others) and not others[0].startswith("-") and "=" not in others[0]
    arguments.hostfile = path(others[0]) if has_hostfile else None
    arguments.arguments = others[has_hostfile:]
    return arguments


def main() -> int:
    arguments = parse_arguments()
    # Imported here so that --help answers at once.
    from aclip.nodes.doctor import doctor

    return doctor(arguments)


if __name__ == "__main__":
    run_reporting_errors(main)
