"""The names of what lies in a run folder.

A run's first start records what the run is made of, under the names below. A later start records
what has changed by then, under a name with the samples at which it continued.
"""

from pathlib import Path

RECIPE_FILE = "recipe.yaml"
DS_CONFIG_FILE = "ds_config.json"
ENVIRONMENT_FILE = "environment.json"
INIT_REPORT_FILE = "init_report.json"
SHARDS_FILE = "shards.json"
START_FILE = "start.json"
METRICS_FILE = "metrics.jsonl"
CHECKPOINTS_FOLDER = "checkpoints"
SCORES_FOLDER = "scores"
SHARED_FILE = ".shared"
TEXT_FOLDER = "text_tower"
TENSORBOARD_FOLDER = "tensorboard"
PICTURES_FOLDER = "pictures"
FIGURE_FOLDER = "figure"
LOGS_FOLDER = "logs"
REPORT_PAGE = "report.html"
REPORT_MARKDOWN = "report.md"
REPORT_CHARTS_FOLDER = "report"
EARLIER_FOLDER = "earlier"
EVALUATION_FOLDER = "evaluation"
RESULTS_FILE = "results.json"


def picture_path(run_folder: Path, samples: int) -> Path:
    """Where the picture of kept patches at so many samples lies."""
    return run_folder / PICTURES_FOLDER / f"kept-patches-{samples:012d}.png"


def evaluation_folder(run_folder: Path, checkpoint: str, model: str) -> Path:
    """Where the results of a model of a checkpoint lie, student or teacher, unless the user names
    another place."""
    return run_folder / EVALUATION_FOLDER / f"{checkpoint}-{model}"


def later_record(run_folder: Path, name: str, samples: int) -> Path:
    """Where the record `name` lies that changed at so many samples."""
    first = run_folder / name
    return first.with_name(f"{first.stem}-samples-{samples:012d}{first.suffix}")


def later_records(run_folder: Path, name: str) -> list[Path]:
    """The records after the first one of that name, oldest first."""
    first = run_folder / name
    return sorted(run_folder.glob(f"{first.stem}-samples-{'[0-9]' * 12}{first.suffix}"))


def record_before(run_folder: Path, name: str, samples: int) -> Path:
    """The record `name` that a checkpoint at so many samples was trained with."""
    here = later_record(run_folder, name, samples)
    earlier = [path for path in later_records(run_folder, name) if path < here]
    return [run_folder / name, *earlier][-1]


def latest_record(run_folder: Path, name: str) -> Path:
    """The record `name` that describes the latest checkpoint; the first one's path if there is
    none."""
    return [run_folder / name, *later_records(run_folder, name)][-1]
