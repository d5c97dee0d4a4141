"""What launch/visualize.py is given, checked before the towers are imported: these take seconds."""

import argparse
from pathlib import Path

from aclip.data.images.suffixes import IMAGE_SUFFIXES, is_litter
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
        names = [path.name for path in Path(entry).iterdir() if not is_litter(path.name)]
        if not any(Path(name).suffix.lower() in IMAGE_SUFFIXES for name in names):
            found = ", ".join(sorted({Path(name).suffix or name for name in names})[:5])
            raise ConfigError(
                f"IMAGES is {entry}, which holds no usable image ({found or 'nothing'} was found); "
                "give others"
            )
    elif not Path(entry).exists():
        raise ConfigError(
            f"IMAGES is {entry}, which can't be read (it does not exist); give image files, "
            "folders of them, or .tar shards"
        )
