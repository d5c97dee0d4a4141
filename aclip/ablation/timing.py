"""What a sample of each row takes on this machine, measured once for an ablation."""

import json
import os
import subprocess
import sys
from pathlib import Path

from aclip.ablation.cases import Case
from aclip.ablation.lengths import in_epochs
from aclip.config.recipe_file import dump_recipe, recipe_of_values
from aclip.errors import ConfigError
from aclip.files import write_whole
from aclip.lock import claim, release

FILE = "seconds.json"
ROUNDS = 9
SECONDS_TO_WAIT = 3600.0
"""The longest that another ablation's measurement in the same folder is waited for."""


def seconds_per_sample(
    cases: list[Case],
    output: Path,
    script: Path,
    micro_batch_size: int,
    num_samples: int,
    device: dict[str, str],
) -> dict[str, float]:
    """Seconds that a sample takes in training, on average over a run, by the case's name.

    The first ablation in a folder measures steps of all rows in turn (launch/benchmark.py: CPU time
    on a CPU, CUDA events on a GPU) and keeps the result there, so that an ablation that goes on has
    the same lengths.

    Args:
        script: launch/benchmark.py.
        micro_batch_size: images of a measured step.
        num_samples: samples of an epoch.
        device: environment variables that give a process its device.

    Raises:
        ConfigError: the measurement failed, or what is kept is of other rows.
    """
    path = output / FILE
    if not path.is_file():
        claim(output, "--output", "a timing of an ablation's rows", SECONDS_TO_WAIT)
        try:
            if not path.is_file():  # another ablation may have measured meanwhile
                _measure(cases, path, script, micro_batch_size, num_samples, device)
        finally:
            release(output)
    kept = json.loads(path.read_text())
    missing = [case.name for case in cases if case.name not in kept]
    if missing:
        raise ConfigError(
            f"{path} holds no time of row {missing[0]}, which came later; give another --output, "
            "so that the times of all rows are of one measurement"
        )
    return kept


def _measure(
    cases: list[Case],
    path: Path,
    script: Path,
    micro_batch_size: int,
    num_samples: int,
    device: dict[str, str],
) -> None:
    folder = path.parent / "timing"
    recipes = {case.name: str(folder / f"{case.name}.yaml") for case in cases}
    for case in cases:
        values = in_epochs(case, num_samples).model_dump(mode="json")
        values["data"] |= {"train": "demo", "sources": []}  # the steps read made-up batches
        recipe = recipe_of_values(values, case.name)
        write_whole(Path(recipes[case.name]), dump_recipe(recipe))
    results, log = folder / "seconds.json", folder / "log.txt"
    command = [sys.executable, str(script), *recipes.values(), "--json", str(results)]
    command += ["--batch_size", str(micro_batch_size), "--rounds", str(ROUNDS)]
    command += ["--threads", device.get("OMP_NUM_THREADS", "1")]
    print(f"timing a step of {len(cases)} rows; its lines are in {log}", flush=True)
    with open(log, "wb") as file:
        ended = subprocess.run(
            command, env=os.environ | device, stdout=file, stderr=subprocess.STDOUT
        )
    if ended.returncode != 0:
        raise ConfigError(
            f"the steps of the rows could not be timed (status {ended.returncode}); see {log}, or "
            "take --budget flops"
        )
    rows = {row["name"]: row["step_seconds"] for row in json.loads(results.read_text())["rows"]}
    seconds = {name: rows[recipe] / micro_batch_size for name, recipe in recipes.items()}
    write_whole(path, json.dumps(seconds, indent=1))
