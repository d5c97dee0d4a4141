"""A checkpoint as files that other software loads: the work behind launch/export.py."""

import argparse
from pathlib import Path

from aclip.errors import ConfigError
from aclip.files import appearing_folder
from aclip.weights.card.options import NO_OPTIONS, CardOptions, check_options
from aclip.weights.first_look import find_checkpoint


def export(arguments: argparse.Namespace, card: CardOptions = NO_OPTIONS) -> None:
    """Runs `launch/export.py` with its parsed arguments.

    The folder appears complete: it is written beside its place and renamed.

    Args:
        card: what the user says for the card.

    Raises:
        ConfigError: no such checkpoint or model, --out is in use, the format can't hold the towers,
            or the card's licence or picture can't be used.
        NotWritten: --out can't be written.
    """
    out = Path(arguments.out)
    _check_out(out)
    find_checkpoint(arguments.checkpoint, arguments.model)
    check_options(card)
    # Imported here: the towers take seconds, which no wrong input should cost.
    from aclip.weights.card.card import write_card
    from aclip.weights.checkpoint_weights import load_checkpoint_weights
    from aclip.weights.tensors_file import writing_tensors
    from aclip.weights.write_export import write_export

    weights = load_checkpoint_weights(arguments.checkpoint, arguments.model)
    with appearing_folder(out) as partial, writing_tensors(out):
        advice = write_export(partial, out, arguments.format, weights)
        write_card(partial, arguments.format, weights, card)
    print(f"wrote the {weights.model} of {weights.folder} to {out}\n{advice}", flush=True)


def _check_out(out: Path) -> None:
    if out.is_dir() and any(out.iterdir()):
        raise ConfigError(f"--out is {out}, which is not empty; give a new folder")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out is {out}, which is a file; give a new folder")
    above = next(folder for folder in out.absolute().parents if folder.exists())
    if not above.is_dir():
        raise ConfigError(
            f"--out is {out}, which can't be written ({above} is a file); give another"
        )
