"""What a run was made of, written into its folder."""

import json
import platform
import socket
import subprocess
from importlib.metadata import version
from pathlib import Path

from aclip.config.recipe import Recipe
from aclip.config.recipe_file import dump_recipe
from aclip.config.text_folder import record_text_folder
from aclip.data.fingerprint import list_lines
from aclip.data.shards.listing import Shard
from aclip.distributed import world_size
from aclip.files import write_whole, writing
from aclip.run_folder.layout import (
    DS_CONFIG_FILE,
    ENVIRONMENT_FILE,
    INIT_REPORT_FILE,
    RECIPE_FILE,
    SHARDS_FILE,
    START_FILE,
    TEXT_FOLDER,
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
    begun: dict | None = None,
    is_first: bool = False,
) -> None:
    """Writes what the run was made of: recipe, ds_config, versions, git commit, shards, first
    weights, and the checkpoint that it began from.

    A first start replaces all records there are. One that continues leaves them, adds what differs
    from the latest record, and removes what was recorded beyond the samples that it continues at.

    Args:
        init_report: what became of the weights that a first start began with, or None.
        samples: the samples at which this start continues; 0 for a new run.
        begun: what --resume said, and the checkpoint; None for a start that goes on.
        is_first: whether this is the first start, which it is at 0 samples anyway.
    """
    packages = ("torch", "deepspeed", "timm", "transformers", "open_clip_torch", "triton")
    environment = {
        "python": platform.python_version(),
        "host": socket.gethostname(),
        "ranks": world_size(),
        "packages": {name: version(name) for name in packages},
        "git_commit": _git_commit(),
    }
    is_first = is_first or samples == 0
    records = {
        RECIPE_FILE: dump_recipe(recipe),
        DS_CONFIG_FILE: json.dumps(ds_values, indent=2),
        ENVIRONMENT_FILE: json.dumps(environment, indent=2),
    }
    if begun is not None:
        records[START_FILE] = json.dumps(begun, indent=2)
    for name, text in records.items():
        _record(run_folder, name, text.encode(), samples, is_first)
    if is_first:
        _remove(run_folder / INIT_REPORT_FILE)
    if init_report is not None:
        write_whole(run_folder / INIT_REPORT_FILE, json.dumps(init_report.to_dict(), indent=2))
    if recipe.model.text.name:
        record_text_folder(recipe.model.text, run_folder / TEXT_FOLDER)
    # The same at every start that continues: other shards are refused.
    write_whole(run_folder / SHARDS_FILE, json.dumps(list_lines(shards), indent=0))


def _record(run_folder: Path, name: str, content: bytes, samples: int, is_first: bool) -> None:
    here = later_record(run_folder, name, samples)
    for path in later_records(run_folder, name):
        if is_first or path > here:
            _remove(path)
    latest = latest_record(run_folder, name)
    if is_first or not latest.is_file():
        write_whole(run_folder / name, content)
    elif latest.read_bytes() != content:
        write_whole(here, content)


def _remove(path: Path) -> None:
    with writing(path):
        path.unlink(missing_ok=True)


def _git_commit() -> str | None:
    source = Path(__file__).resolve().parent
    try:
        result = subprocess.run(
            ["git", "-C", source, "rev-parse", "HEAD"], capture_output=True, text=True
        )
    except FileNotFoundError:
        return None
    return result.stdout.strip() or None
