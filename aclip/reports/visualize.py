"""What launch/visualize.py is given, checked before the towers are imported: these take seconds."""

import argparse
from pathlib import Path

from aclip.data.members import IMAGE_SUFFIXES
from aclip.data.shards.listing import list_shards
from aclip.data.shards.remote import is_remote
from aclip.errors import ConfigError
from aclip.files import check_writable
from aclip.run_folder.layout import FIGURE_FOLDER
from aclip.weights.first_look import find_checkpoint


def visualize(arguments: argparse.Namespace) -> None:
    """Runs `launch/visualize.py` with its parsed arguments.

    Raises:
        ConfigError: no such checkpoint, image or shard, nothing usable in them, or --out can't be
            written.
    """
    folder, _ = find_checkpoint(arguments.checkpoint, None)
    for entry in arguments.images:
        _check_image(entry)
    out = Path(arguments.out or folder.resolve().parent.parent / FIGURE_FOLDER)
    check_writable(out, "--out")
    from aclip.reports.figure import write_figure

    write_figure(arguments.checkpoint, arguments.images, out)


def _check_image(entry: str) -> None:
    if entry.endswith(".tar") or is_remote(entry):
        list_shards(entry, "IMAGES")
    elif Path(entry).is_dir():
        if not any(p.suffix.lower()[1:] in IMAGE_SUFFIXES for p in Path(entry).iterdir()):
            raise ConfigError(
                f"IMAGES is {entry}, which holds no usable image ({', '.join(IMAGE_SUFFIXES)}); "
                "give others"
            )
    elif not Path(entry).exists():
        raise ConfigError(
            f"IMAGES is {entry}, which can't be read (it does not exist); give image files, "
            "folders of them, or .tar shards"
        )
