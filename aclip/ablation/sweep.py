"""A learning rate for each row: short runs at several rates on a seed that no table shows."""

import math
from pathlib import Path

from aclip.ablation.cases import Case
from aclip.ablation.results import reached
from aclip.ablation.runs import Run, make_run

SWEEP_SEED = 1000
"""The seed of these runs; those of the tables count from 0 and stay below it."""
RATE_KEY = "optimizer.lr"


class Sweep:
    """The runs of a sweep and what follows from those that are finished.

    Args:
        cases: at the length of the sweep's runs.
        rates: learning rates, each once.
        output, ds_values, data: see make_runs.
    """

    def __init__(
        self, cases: list[Case], rates: list[float], output: Path, ds_values: dict, data: dict
    ):
        self._runs: dict[str, dict[float, Run]] = {}
        for case in cases:
            quiet = ["train.evaluate_at=[]", "train.evaluate_every=0", "train.keep_checkpoints=1"]
            self._runs[case.name] = {
                rate: make_run(
                    case.changed([*quiet, f"{RATE_KEY}={rate:g}"]),
                    SWEEP_SEED,
                    output / f"{case.name}-lr{rate:g}",
                    ds_values,
                    data,
                    may_diverge=True,
                )
                for rate in sorted(rates)
            }

    @property
    def runs(self) -> list[Run]:
        return [run for of_case in self._runs.values() for run in of_case.values()]

    def accuracies(self, name: str) -> dict[float, float]:
        """What a case's finished runs reached, by their rates; NaN where the loss was not finite.

        Args:
            name: the case's.
        """
        return {
            rate: math.nan if run.has_diverged else reached(run)
            for rate, run in self._runs[name].items()
            if run.is_finished
        }

    def rate(self, name: str) -> float | None:
        """The rate that a case gets; None while a run is missing, and where no run has learned."""
        accuracies = self.accuracies(name)
        is_complete = len(accuracies) == len(self._runs[name])
        return choose_rate(accuracies) if is_complete else None


def choose_rate(accuracies: dict[float, float]) -> float | None:
    """The rate with the best accuracy; of equal ones, that nearest to the middle of all rates, and
    of two as near, the lower one. None where all are NaN."""
    rates = sorted(accuracies)
    known = {rate: value for rate, value in accuracies.items() if not math.isnan(value)}
    if not known:
        return None
    best = max(known.values())
    middle = (len(rates) - 1) / 2
    tied = [rate for rate, value in known.items() if value == best]
    return min(tied, key=lambda rate: (abs(rates.index(rate) - middle), rate))
