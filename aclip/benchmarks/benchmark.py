"""What launch/benchmark.py measures: training steps, loading, dealing, saving, or scaling."""

import argparse
from pathlib import Path

from aclip.errors import ConfigError
from aclip.machine import check_gpus


def benchmark(arguments: argparse.Namespace) -> int:
    """Runs `launch/benchmark.py` with its parsed arguments; returns the exit status.

    Raises:
        ConfigError: bad input, before anything is timed.
    """
    _check(arguments)
    # Imported here: each imports what it times, which the others can do without.
    if arguments.loader:
        from aclip.benchmarks.loading import benchmark_loading

        return benchmark_loading(arguments)
    if arguments.dealing:
        from aclip.benchmarks.dealing import benchmark_dealing

        return benchmark_dealing(arguments)
    if arguments.saving:
        from aclip.benchmarks.saving import benchmark_saving

        return benchmark_saving(arguments)
    if arguments.scaling:
        from aclip.benchmarks.scaling import benchmark_scaling

        return benchmark_scaling(arguments)
    from aclip.benchmarks.step_cost import benchmark_steps

    return benchmark_steps(arguments)


def _check(arguments: argparse.Namespace) -> None:
    """Finds wrong input before what is timed is imported, which takes seconds."""
    if arguments.json and not Path(arguments.json).absolute().parent.is_dir():
        raise ConfigError(f"--json is {arguments.json}, whose folder is not there; make it first")
    if arguments.loader or arguments.dealing:
        return
    if arguments.scaling:
        from aclip.nodes.hostfile import read_hostfile

        read_hostfile(arguments.scaling)
    check_gpus()
    from aclip.config.recipe_file import load_recipe

    for name in arguments.recipes:
        load_recipe(name, [*arguments.set, "data.train=demo"])
