"""What a run was made of, written into its folder."""

import json
import platform
import socket
import subprocess
from importlib.metadata import version
from pathlib import Path

from aclip.config.recipe import Recipe
from aclip.config.recipe_file import dump_recipe
from aclip.distributed import world_size
from aclip.files import write_whole
from aclip.run_folder.layout import DS_CONFIG_FILE, ENVIRONMENT_FILE, INIT_REPORT_FILE, RECIPE_FILE


def record_run(run_folder: Path, recipe: Recipe, ds_values: dict, init_report) -> None:
    """Writes what the run was made of: recipe, ds_config, versions, git commit, first weights."""
    packages = ("torch", "deepspeed", "timm", "transformers", "open_clip_torch", "triton")
    environment = {
        "python": platform.python_version(),
        "host": socket.gethostname(),
        "ranks": world_size(),
        "packages": {name: version(name) for name in packages},
        "git_commit": _git_commit(),
    }
    records = {DS_CONFIG_FILE: ds_values, ENVIRONMENT_FILE: environment}
    if init_report is not None:
        records[INIT_REPORT_FILE] = init_report.to_dict()
    write_whole(run_folder / RECIPE_FILE, dump_recipe(recipe).encode())
    for name, values in records.items():
        write_whole(run_folder / name, json.dumps(values, indent=2).encode())


def _git_commit() -> str | None:
    source = Path(__file__).resolve().parent
    try:
        result = subprocess.run(
            ["git", "-C", source, "rev-parse", "HEAD"], capture_output=True, text=True
        )
    except FileNotFoundError:
        return None
    return result.stdout.strip() or None
