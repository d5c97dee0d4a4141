"""What a run was made of, written into its folder."""

import json
import platform
import socket
import subprocess
from importlib.metadata import version
from pathlib import Path

from aclip.config.recipe import Recipe
from aclip.config.recipe_file import dump_recipe
from aclip.data.fingerprint import list_lines
from aclip.data.shards.listing import Shard
from aclip.distributed import world_size
from aclip.files import write_whole
from aclip.run_folder.layout import (
    DS_CONFIG_FILE,
    ENVIRONMENT_FILE,
    INIT_REPORT_FILE,
    RECIPE_FILE,
    SHARDS_FILE,
    later_record,
    later_records,
    latest_record,
)


def record_run(
    run_folder: Path,
    recipe: Recipe,
    ds_values: dict,
    init_report,
    shards: list[Shard],
    samples: int,
) -> None:
    """Writes what the run was made of: recipe, ds_config, versions, git commit, shards, first
    weights.

    A first start replaces all records there are. One that continues leaves them, adds what differs
    from the latest record, and removes what was recorded beyond the samples that it continues at.

    Args:
        init_report: what became of the weights that a first start began with, or None.
        samples: the samples at which this start continues; 0 for a first start.
    """
    packages = ("torch", "deepspeed", "timm", "transformers", "open_clip_torch", "triton")
    environment = {
        "python": platform.python_version(),
        "host": socket.gethostname(),
        "ranks": world_size(),
        "packages": {name: version(name) for name in packages},
        "git_commit": _git_commit(),
    }
    if samples == 0:
        (run_folder / INIT_REPORT_FILE).unlink(missing_ok=True)
    _record(run_folder, RECIPE_FILE, dump_recipe(recipe), samples)
    _record(run_folder, DS_CONFIG_FILE, json.dumps(ds_values, indent=2), samples)
    _record(run_folder, ENVIRONMENT_FILE, json.dumps(environment, indent=2), samples)
    if init_report is not None:
        _write(run_folder / INIT_REPORT_FILE, json.dumps(init_report.to_dict(), indent=2))
    # The same at every start that continues: other shards are refused.
    _write(run_folder / SHARDS_FILE, json.dumps(list_lines(shards), indent=0))


def _record(run_folder: Path, name: str, text: str, samples: int) -> None:
    here = later_record(run_folder, name, samples)
    for path in later_records(run_folder, name):
        if samples == 0 or path > here:
            path.unlink()
    latest = latest_record(run_folder, name)
    if samples == 0 or not latest.is_file():
        _write(run_folder / name, text)
    elif latest.read_text() != text:
        _write(here, text)


def _write(path: Path, text: str) -> None:
    write_whole(path, text.encode())


def _git_commit() -> str | None:
    source = Path(__file__).resolve().parent
    try:
        result = subprocess.run(
            ["git", "-C", source, "rev-parse", "HEAD"], capture_output=True, text=True
        )
    except FileNotFoundError:
        return None
    return result.stdout.strip() or None
