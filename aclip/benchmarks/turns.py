"""Systems take turns, so that a machine whose speed drifts is fair to each of them.

Either all stay in memory, or each is built for its turn and freed behind it. A timed step always
follows one of its own system that is not timed, so that its memory is there already.
"""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace

import torch

from aclip.benchmarks.cost_table import System
from aclip.benchmarks.device_work import device_work
from aclip.benchmarks.host_pages import kept_pages
from aclip.benchmarks.peak_memory import peak_growth

Build = Callable[[], AbstractContextManager[list[System]]]
"""Makes systems that share a model, which is there as long as the context."""


def take_turns(
    builds: list[Build], rounds: int, device: torch.device, rebuild: bool = False
) -> list[list[System]]:
    """Times a step of each system in every round, and measures its memory once.

    Args:
        rebuild: whether one of `builds` is in memory at a time. Takes the time of building it and
            of one more step for each turn.

    Returns:
        The systems of each of `builds`; with `rebuild` without a step that could run.
    """
    gc.disable()  # a collection would fall into somebody's step
    try:
        return (_rebuilt if rebuild else _kept)(builds, rounds, device)
    finally:
        gc.enable()


def _kept(builds: list[Build], rounds: int, device: torch.device) -> list[list[System]]:
    with ExitStack() as stack:
        built = [stack.enter_context(build()) for build in builds]
        systems = [system for of_build in built for system in of_build]
        for system in systems:
            _measure_memory(system, device)
        with kept_pages():
            for system in systems:
                system.step()  # takes the pages
            for index in range(rounds):
                for system in systems:
                    system.seconds.append(_time(system, device))
                print(f"round {index + 1} of {rounds}", flush=True)
        for system in systems:
            _measure_work(system, device)
    return built


def _rebuilt(builds: list[Build], rounds: int, device: torch.device) -> list[list[System]]:
    known: list[list[System]] = []
    for index in range(rounds):
        for number, build in enumerate(builds):
            with build() as systems:
                if index == 0:
                    for system in systems:
                        _measure_memory(system, device)
                        _measure_work(system, device)
                    known.append([replace(system, step=_gone) for system in systems])
                with kept_pages():
                    for system in systems:
                        system.step()
                    for system, of_first in zip(systems, known[number], strict=True):
                        of_first.seconds.append(_time(system, device))
            del systems, system
            gc.collect()
        print(f"round {index + 1} of {rounds}", flush=True)
    return known


def _gone() -> None:
    raise RuntimeError("the model of this step is no longer in memory")


def _measure_memory(system: System, device: torch.device) -> None:
    system.step()  # makes the optimizer's state
    gc.collect()
    system.peak_bytes = peak_growth(system.step, device)


def _measure_work(system: System, device: torch.device) -> None:
    if device.type == "cuda":
        system.work = device_work(system.step)


def _time(system: System, device: torch.device) -> float:
    gc.collect()
    with _clock(device) as seconds:
        system.step()
    return seconds[0]


@contextmanager
def _clock(device: torch.device) -> Iterator[list[float]]:
    result: list[float] = []
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        yield result
        end.record()
        end.synchronize()
        result.append(start.elapsed_time(end) / 1000)
    else:
        before = time.process_time()
        yield result
        result.append(time.process_time() - before)
