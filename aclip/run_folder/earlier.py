"""What becomes of a run without a checkpoint when another one begins in its folder."""

import os
from contextlib import suppress
from pathlib import Path

from aclip.files import make_folder, writing
from aclip.run_folder.layout import (
    DS_CONFIG_FILE,
    EARLIER_FOLDER,
    ENVIRONMENT_FILE,
    METRICS_FILE,
    PICTURES_FOLDER,
    RECIPE_FILE,
    REPORT_CHARTS_FOLDER,
    REPORT_MARKDOWN,
    REPORT_PAGE,
    START_FILE,
    TENSORBOARD_FOLDER,
    later_records,
)
from aclip.run_folder.metrics_file import read_metrics

RECORDS = (RECIPE_FILE, DS_CONFIG_FILE, ENVIRONMENT_FILE, START_FILE)
TOLD = (METRICS_FILE, TENSORBOARD_FOLDER, PICTURES_FOLDER)
PAGES = (REPORT_PAGE, REPORT_MARKDOWN, REPORT_CHARTS_FOLDER)


def set_aside(run_folder: Path) -> Path | None:
    """Moves what a run has told of itself into a folder of its own, which is a run folder too.

    A run that has not logged a step leaves nothing to keep.

    Returns:
        The folder, such as earlier-1; None where there is nothing to keep.

    Raises:
        NotWritten: it could not be moved.
    """
    if not (run_folder / METRICS_FILE).is_file() or not read_metrics(run_folder).steps:
        return None
    taken = (path.name.rpartition("-")[2] for path in run_folder.glob(f"{EARLIER_FOLDER}-*"))
    number = 1 + max((int(number) for number in taken if number.isdecimal()), default=0)
    earlier = run_folder / f"{EARLIER_FOLDER}-{number}"
    later = [path.name for name in RECORDS for path in later_records(run_folder, name)]
    make_folder(earlier)
    for name in (*RECORDS, *later, *TOLD, *PAGES):
        with writing(earlier / name), suppress(FileNotFoundError):
            os.rename(run_folder / name, earlier / name)
    return earlier
