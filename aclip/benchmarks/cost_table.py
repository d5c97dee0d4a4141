"""The cost table: systems whose steps were timed in the same rounds, and how they read."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from aclip.benchmarks.device_work import DeviceWork, OnGpu, Predicted, device_table
from aclip.cli import MIB, text_table


@dataclass
class System:
    """One row of the table.

    Attributes:
        name: what the table calls it.
        step: runs one optimizer update.
        state_bytes: what weights, optimizer and teacher take between steps.
        gflops: of one sample, forward and backward; None where it is not counted.
        share: of the steps of a run that has several kinds.
        seconds: the time of a step in each round.
        peak_bytes: what a step takes at its peak, on top of what stays between steps.
        work: what a GPU does in a step; None on a CPU.
        predicted: what was predicted of it; None where nothing was.
        is_average: whether it is the average over the kinds of step of a run.
    """

    name: str
    step: Callable[[], object]
    state_bytes: int
    gflops: float | None
    share: float = 1.0
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    work: DeviceWork | None = None
    predicted: Predicted | None = None
    is_average: bool = False


@dataclass(frozen=True)
class Row:
    """What the table says of a system; times in seconds, memory in MiB."""

    name: str
    step_seconds: float
    ratios: dict[str, float]
    """The time over each baseline's, median over the rounds."""
    spread: tuple[float, float]
    """Least and greatest ratio to the first baseline."""
    images_per_second: float
    gflops: float | None
    state_mib: float
    step_mib: float
    on_gpu: OnGpu | None = None
    is_average: bool = False


def with_average(name: str, kinds: list[System]) -> list[System]:
    """The kinds of step of a run, and before them the run itself, which is their average; a single
    kind is the run."""
    return kinds if len(kinds) == 1 else [_average(name, kinds), *kinds]


def _average(name: str, kinds: list[System]) -> System:
    def mean(value: Callable[[System], float]) -> float:
        return sum(kind.share * value(kind) for kind in kinds)

    work = None
    if all(kind.work is not None for kind in kinds):
        work = DeviceWork(
            round(mean(lambda kind: kind.work.launches)),
            mean(lambda kind: kind.work.busy_seconds),
        )
    return replace(
        kinds[0],
        name=name,
        gflops=mean(lambda kind: kind.gflops),
        share=1.0,
        seconds=[mean(lambda kind, i=i: kind.seconds[i]) for i in range(len(kinds[0].seconds))],
        state_bytes=max(kind.state_bytes for kind in kinds),
        peak_bytes=max(kind.peak_bytes for kind in kinds),
        work=work,
        is_average=True,
    )


def make_row(system: System, systems: list[System], baselines: list[str], batch_size: int) -> Row:
    """Medians over the rounds; a ratio is the median of the rounds' ratios."""
    by_name = {other.name: other for other in systems}
    ratios = {
        name: [a / b for a, b in zip(system.seconds, by_name[name].seconds, strict=True)]
        for name in baselines
    }
    seconds = statistics.median(system.seconds)
    first = ratios[baselines[0]]
    on_gpu = None
    if system.work is not None:
        busy_share = system.work.busy_seconds / seconds
        on_gpu = OnGpu(system.work.launches, busy_share, system.predicted)
    return Row(
        system.name,
        seconds,
        {name: statistics.median(values) for name, values in ratios.items()},
        (min(first), max(first)),
        batch_size / seconds,
        system.gflops,
        system.state_bytes / MIB,
        system.peak_bytes / MIB,
        on_gpu,
        system.is_average,
    )


def format_table(rows: list[Row], baselines: list[str], environment: dict) -> str:
    """The rows as text, the environment below."""
    ratios = [f"/ {name}" for name in baselines]
    cells = [["", "s a step", *ratios, "min - max", "img/s", "GFLOP", "state MiB", "step MiB"]]
    for row in rows:
        line = [row.name, f"{row.step_seconds:.4g}"]
        line += [f"{row.ratios[name]:.3f}" for name in baselines]
        line += [f"{row.spread[0]:.3f}-{row.spread[1]:.3f}", f"{row.images_per_second:.4g}"]
        line.append("" if row.gflops is None else f"{row.gflops:.1f}")
        cells.append([*line, f"{row.state_mib:,.0f}", f"{row.step_mib:,.0f}"])
    legend = "GFLOP: of one image-caption pair, forward and backward; step: on top of state"
    averages = [row.name for row in rows if row.is_average]
    if averages:
        legend += (
            f"\n{', '.join(averages)}: the average over a run; below it its kinds of step, with "
            "their shares of its steps"
        )
    facts = ", ".join(f"{key} {value}" for key, value in environment.items())
    of_gpu = [(row.name, row.step_seconds, row.on_gpu) for row in rows if row.on_gpu is not None]
    return "\n".join([text_table(cells), legend, *device_table(of_gpu), facts])
