"""What an ablation is made of, checked before its first run: rows, data, lengths, a sweep."""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from aclip.ablation.cases import Case, make_cases
from aclip.ablation.devices import choose_devices
from aclip.ablation.rows import Row, choose_rows, decided_by
from aclip.ablation.rows_file import SUFFIXES, read_rows
from aclip.ablation.runs import CONTENT, Run, make_runs
from aclip.ablation.sweep import RATE_KEY, SWEEP_SEED, Sweep
from aclip.config.ds_config import DsConfig, read_ds_config
from aclip.config.recipe import Recipe
from aclip.config.recipe_file import load_recipe, stages_of
from aclip.data.find_data import find_data
from aclip.data.fingerprint import count_shards, digests
from aclip.data.shards.listing import Shard
from aclip.data.word_counts import find_word_counts
from aclip.errors import ConfigError
from aclip.files import check_writable

LEAST_STEPS = 40
"""With fewer steps, a run can't be cut into equal quarters of whole steps."""
DECIDED_HERE = {
    "mask.keep_ratio",
    "train.seed",
    "train.evaluate_every",
    "train.evaluate_at",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.upload_to",
}
"""Keys of the recipe that no override and no row may set."""
LENGTH = {"train.epochs", "train.samples"}
EQUAL_IN_ALL_ROWS = {*LENGTH, "train.global_batch_size"}
"""An override may set them, a row may not, except for the length of a row with stages."""


@dataclass(frozen=True)
class Prepared:
    """An ablation, checked.

    Attributes:
        cases: at their lengths, evaluated at the quarters of their runs.
        sweep: chooses the learning rates; None where each row has that of its recipe.
        num_seeds: of each case.
        output: folder of the runs.
        ds_values: the ds_config's content.
        data: what identifies the shards.
        note: what is equal in all rows, a sentence for the page; empty where nothing was asked for.
    """

    cases: list[Case]
    sweep: Sweep | None
    num_seeds: int
    output: Path
    ds_values: dict
    data: dict
    note: str = ""

    def undecided(self) -> set[str]:
        """Names of the cases for which the sweep has not chosen a learning rate."""
        if self.sweep is None:
            return set()
        return {case.name for case in self.cases if self.sweep.rate(case.name) is None}

    def runs(self) -> list[Run]:
        """All runs of the tables; where a sweep has not chosen a case's learning rate yet, they
        have that of the recipe."""
        cases = []
        for case in self.cases:
            rate = None if self.sweep is None else self.sweep.rate(case.name)
            cases.append(case if rate is None else case.changed([f"{RATE_KEY}={rate:g}"]))
        return make_runs(cases, self.num_seeds, self.output, self.ds_values, self.data)


def prepare(arguments: argparse.Namespace) -> Prepared:
    """Reads and checks what the parsed arguments of `launch/ablate.py` name.

    Raises:
        ConfigError: a wrong argument, a row that can't be made of the recipe, no data, no free
            device for a budget of time, an output folder that can't be written or holds other runs.
    """
    _check(arguments)
    output = Path(arguments.output)
    rows = choose(arguments)
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    if not recipe.data.train and not recipe.data.sources:
        raise ConfigError(
            f"data.train is empty in {arguments.recipe}; give shards, such as "
            "data.train='/data/*.tar'"
        )
    ds_config = read_ds_config(arguments.ds_config, recipe.train.global_batch_size, 1)
    check_writable(output, "--output")
    shards, val_shards = find_data(recipe)
    if not val_shards:
        raise ConfigError(
            f"data.val is empty in {arguments.recipe}; give validation shards, on which the rows "
            "are compared"
        )
    num_samples = sum(shard.num_samples for shard in shards)
    _check_length(recipe, num_samples)
    cases = make_cases(rows, arguments.recipe, arguments.overrides, arguments.keep_ratio)
    check_word_counts(cases, shards)
    data = count_shards(recipe.data, shards)
    data["val_samples"] = sum(shard.num_samples for shard in val_shards)
    data[CONTENT] = {"train": digests(shards), "val": digests(val_shards)}
    cases, swept = _with_lengths(arguments, cases, num_samples, ds_config)
    sweep = None
    if arguments.lr_sweep:
        sweep = Sweep(swept, arguments.lr_sweep, output, ds_config.values, data)
    prepared = Prepared(
        cases, sweep, arguments.seeds, output, ds_config.values, data, note=_note(arguments, cases)
    )
    for run in sweep.runs if sweep is not None else prepared.runs():
        run.check()
    return prepared


def check_word_counts(cases: Sequence[Case], shards: list[Shard]) -> None:
    """Raises ConfigError if a row or a stage of it needs counts of words that are not there."""
    for case in cases:
        for stage in stages_of(case.recipe):
            if stage.text.reduce == "frequency":
                find_word_counts(stage, shards)


def choose(arguments: argparse.Namespace) -> list[Row]:
    """The rows that --rows names.

    Raises:
        ConfigError: there is no such row, or the command line gives a key that a row or the
            ablation itself decides.
    """
    names = arguments.rows
    is_file = [Path(name).suffix in SUFFIXES for name in names]
    if any(is_file[1:]):
        raise ConfigError(
            f"--rows names {' '.join(names)}; give one file of rows first, and names of its rows "
            "behind it"
        )
    rows = read_rows(names[0], names[1:]) if is_file[0] else choose_rows(names)
    here = DECIDED_HERE | ({RATE_KEY} if arguments.lr_sweep else set())
    decided = here | (decided_by(rows) - LENGTH)
    for override in arguments.overrides:
        key = override.partition("=")[0]
        if key in decided or (key.startswith("stages.") and "stages" in decided):
            raise ConfigError(
                f"override is {override}, but an ablation decides {key}, by its rows, "
                "--keep_ratio, --seeds, --lr_sweep or the quarters of a run; leave it out"
            )
    for row in rows:
        allowed = set() if row.drops_patches else {"mask.keep_ratio"}
        if "stages" in decided_by([row]) or row.recipe:
            allowed |= LENGTH
        for key in sorted(decided_by([row]) & (here | EQUAL_IN_ALL_ROWS) - allowed):
            raise ConfigError(
                f"row {row.name} sets {key}, which is equal in all rows; give it on the command "
                "line, or leave it out"
            )
    return rows


def _check(arguments: argparse.Namespace) -> None:
    if not 1 <= arguments.seeds <= SWEEP_SEED:
        raise ConfigError(f"--seeds is {arguments.seeds}; give 1 to {SWEEP_SEED}")
    if arguments.processes is not None and arguments.processes < 1:
        raise ConfigError(f"--processes is {arguments.processes}; give 1 or more")
    if not arguments.caption_tokens >= 2:
        raise ConfigError(f"--caption_tokens is {arguments.caption_tokens:g}; give 2 or more")
    for option, values in (
        ("keep_ratio", arguments.keep_ratio),
        ("lr_sweep", arguments.lr_sweep or []),
    ):
        shown = [f"{value:g}" for value in values]
        if len(set(shown)) < len(shown):
            raise ConfigError(f"--{option} is {' '.join(shown)}; give each value once")
    for rate in arguments.lr_sweep or []:
        if not 0 < rate < math.inf:
            raise ConfigError(f"--lr_sweep has {rate:g}; give learning rates above 0")
    if not 0 < arguments.lr_sweep_share <= 1:
        raise ConfigError(
            f"--lr_sweep_share is {arguments.lr_sweep_share:g}; give a share in (0, 1]"
        )
    if arguments.lr_sweep_share < 1 and not arguments.lr_sweep:
        raise ConfigError("--lr_sweep_share is given without --lr_sweep; give the rates too")
    if arguments.budget_row and not arguments.budget:
        raise ConfigError("--budget_row is given without --budget; say what is to be equal")


def _check_length(recipe: Recipe, num_samples: int) -> None:
    train, steps = recipe.train, recipe.num_steps(num_samples)
    if steps < LEAST_STEPS:
        enough = math.ceil(100 * LEAST_STEPS * train.global_batch_size / num_samples) / 100
        length = "epochs" if train.samples is None else "samples"
        raise ConfigError(
            f"train.{length} is {getattr(train, length):g}, which is {steps} steps, but the rows "
            f"are compared after {LEAST_STEPS} steps at the least; raise train.epochs to "
            f"{enough:g} or more"
        )


def _with_lengths(
    arguments: argparse.Namespace, cases: list[Case], num_samples: int, ds_config: DsConfig
) -> tuple[list[Case], list[Case]]:
    """The cases at their lengths, for the tables and for the sweep."""
    # Imported here, since the towers take seconds.
    from aclip.ablation.lengths import Lengths
    from aclip.ablation.timing import seconds_per_sample

    for case in cases:
        if case.row.recipe and case.recipe.stages and arguments.budget is None:
            raise ConfigError(
                f"row {case.row.name} takes stages from {case.row.recipe}, whose lengths are those "
                "of another run; say with --budget what is to be equal in all rows"
            )
    of = _budget_case(arguments.budget_row, cases)
    seconds = None
    if arguments.budget == "time":
        device = choose_devices(arguments.processes, len(cases) * arguments.seeds)[0]
        seconds = seconds_per_sample(
            cases,
            Path(arguments.output),
            Path(arguments.script).with_name("benchmark.py"),
            ds_config.micro_batch_size,
            num_samples,
            device,
        )
    lengths = Lengths(arguments.budget, num_samples, arguments.caption_tokens, seconds)
    cases = lengths.equal(cases, of)
    swept = []
    if arguments.lr_sweep:
        swept = [lengths.shortened(case, arguments.lr_sweep_share) for case in cases]
    for case in cases:
        if (steps := lengths.num_steps(case)) < LEAST_STEPS:
            raise ConfigError(
                f"row {case.row.name} has {steps} steps, but the rows are compared after "
                f"{LEAST_STEPS} steps at the least; raise train.epochs"
            )
    return [lengths.at_quarters(case) for case in cases], swept


def _note(arguments: argparse.Namespace, cases: list[Case]) -> str:
    if arguments.budget is None:
        return ""
    name = {"samples": "samples", "flops": "FLOPs", "time": "seconds of the steps"}
    of = _budget_case(arguments.budget_row, cases)
    return (
        f"A run of each row has as many {name[arguments.budget]} as one of "
        f"{of.label}, whose length is its recipe's."
    )


def _budget_case(name: str | None, cases: list[Case]) -> Case:
    """The case whose run says how much all may cost; the first one if none is named."""
    if name is None:
        return cases[0]
    found = [case for case in cases if name in (case.name, case.row.name)]
    if not found:
        known = ", ".join(case.name for case in cases)
        raise ConfigError(
            f"--budget_row is {name}, which is not among the rows; take one of {known}"
        )
    return found[0]
