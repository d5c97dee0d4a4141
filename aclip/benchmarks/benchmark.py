"""What launch/benchmark.py measures: training steps, loading, dealing, or scaling."""

import argparse


def benchmark(arguments: argparse.Namespace) -> int:
    """Runs `launch/benchmark.py` with its parsed arguments; returns the exit status.

    Raises:
        ConfigError: bad input, before anything is timed.
    """
    # Imported here: each imports what it times, which the others can do without.
    if arguments.loader:
        from aclip.benchmarks.loading import benchmark_loading

        return benchmark_loading(arguments)
    if arguments.dealing:
        from aclip.benchmarks.dealing import benchmark_dealing

        return benchmark_dealing(arguments)
    if arguments.scaling:
        from aclip.benchmarks.scaling import benchmark_scaling

        return benchmark_scaling(arguments)
    from aclip.benchmarks.step_cost import benchmark_steps

    return benchmark_steps(arguments)
