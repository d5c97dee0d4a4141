"""The names of what lies in a run folder."""

from pathlib import Path

RECIPE_FILE = "recipe.yaml"
DS_CONFIG_FILE = "ds_config.json"
ENVIRONMENT_FILE = "environment.json"
INIT_REPORT_FILE = "init_report.json"
METRICS_FILE = "metrics.jsonl"
CHECKPOINTS_FOLDER = "checkpoints"
TENSORBOARD_FOLDER = "tensorboard"
FIGURE_FOLDER = "figure"
LOGS_FOLDER = "logs"
REPORT_PAGE = "report.html"
REPORT_MARKDOWN = "report.md"
REPORT_CHARTS_FOLDER = "report"


def picture_path(run_folder: Path, samples: int) -> Path:
    """Where the picture of kept patches at so many samples lies."""
    return run_folder / "pictures" / f"kept-patches-{samples:012d}.png"
