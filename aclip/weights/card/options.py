"""What a user says of an export for its card; checked before the towers are imported."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from aclip.config.recipe import Recipe
from aclip.errors import ConfigError

NAME_ON_THE_HUB = "OWNER/NAME"
"""Stands in the card's code where the export has no name on the Hub yet."""
_LICENSE = re.compile(r"[a-z0-9]+([.-][a-z0-9]+)*")


@dataclass(frozen=True)
class CardOptions:
    """What a card holds that no run folder tells.

    Attributes:
        repo: the export's name on the Hub, OWNER/NAME; None while it has none.
        license: the licence of the weights, as the Hub identifies it; None where none is given.
        picture: a picture for the card; None for the run's own, where its data are the built-in
            scenes. Nobody's images are shown unless the user names the file.
        sample_flops: counts the FLOPs of a sample in training, on average over a run with the
            recipe, from the recipe and the samples of an epoch. It stands in planning/, above this
            room. None leaves the FLOPs out.
    """

    repo: str | None = None
    license: str | None = None
    picture: str | None = None
    sample_flops: Callable[[Recipe, float], float] | None = None

    @property
    def name(self) -> str:
        """What the card's code loads the export by."""
        return self.repo or NAME_ON_THE_HUB


NO_OPTIONS = CardOptions()


def check_options(options: CardOptions) -> None:
    """Refuses a licence that is no identifier, and a picture that can't be read.

    Raises:
        ConfigError: says which, and what to do.
    """
    if options.license is not None and not _LICENSE.fullmatch(options.license):
        raise ConfigError(
            f"--license is {options.license}, which is no identifier of the Hub's; give one such "
            "as mit, apache-2.0, cc-by-4.0 or other"
        )
    if options.picture is not None:
        read_picture(Path(options.picture))


def read_picture(path: Path) -> Image.Image:
    """The pixels of a picture alone, without what else its file says, such as the place of a photo.

    Raises:
        ConfigError: it can't be read.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or "it is no image"
        raise ConfigError(
            f"--picture is {path}, which can't be read ({reason}); give an image file, such as the "
            "figure.png that launch/visualize.py writes"
        ) from None
